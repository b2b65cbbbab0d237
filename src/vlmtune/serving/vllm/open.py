"""From a MODEL argument to an engine that lets vLLM compute."""

from __future__ import annotations

from pathlib import Path

from vlmtune.data.media import ImagePolicy
from vlmtune.errors import UsageError
from vlmtune.models.contract import make_contract, verify_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import Resolved, resolve
from vlmtune.serving.limits import Limits
from vlmtune.serving.served import ServedModel, default_name, limited
from vlmtune.serving.settings import EngineConfig
from vlmtune.serving.vllm.engine import VllmEngine
from vlmtune.serving.vllm.process import Launch, Process, VllmConfig, check_config, find_program
from vlmtune.serving.vllm.proof import check_pictures
from vlmtune.serving.vllm.wire import Wire

# What ``Launch`` says, and what would change tokens, pixels, or who runs code on this machine.
OURS = (
    "model",
    "model-tag",
    "tokenizer",
    "served-model-name",
    "host",
    "port",
    "uds",
    "generation-config",
    "override-generation-config",
    "allowed-media-domains",
    "allowed-local-media-path",
    "limit-mm-per-prompt",
    "max-num-seqs",
    "hf-overrides",
    "mm-processor-kwargs",
    "media-io-kwargs",
    "tokens-only",
    "logprobs-mode",
    "trust-remote-code",
    "middleware",
)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def open_vllm(
    model: str | Path,
    vllm: VllmConfig,
    *,
    name: str | None = None,
    image: ImagePolicy | None = None,
    loading: LoadingConfig | None = None,
    engine: EngineConfig | None = None,
    limits: Limits | None = None,
) -> VllmEngine:
    """An engine whose vLLM has been started and is loading; its ``start`` waits for that.

    Args:
        model: A merged model, or a plain one; hub id or folder.
        vllm: Which vLLM computes.
        name: What requests call the model; None takes the folder's name or the hub id.
        image: Image policy of a plain model.
        loading: Only its dtype; vLLM knows its own devices.
        engine: How many at once.
        limits: How many images a question may have.

    Raises:
        UsageError: If vLLM is not there, or MODEL is none that it could serve.
        ContractMismatchError: If it would see other pixels than the model was trained on.
    """
    loading, engine = loading or LoadingConfig(), engine or EngineConfig()
    program = find_program(vllm.program)
    if vllm.options is not None:
        check_config(vllm.options, OURS)
    resolved = resolve(model)
    _judge(resolved, loading)
    encoder = _encoder(resolved, image)
    check_pictures(resolved.base.folder, encoder)
    launch = Launch(
        program=program,
        folder=resolved.base.folder,
        rows=engine.batch_rows,
        images=(limits or Limits()).max_images,
        dtype=None if loading.dtype is None else DTYPES[loading.dtype],
        config=vllm.options,
    )
    served = limited(ServedModel(name or default_name(model), encoder, None))
    process = Process(launch)
    return VllmEngine(served, Wire(process.socket), engine, process=process)


def _judge(resolved: Resolved, loading: LoadingConfig) -> None:
    if loading.dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype: found {loading.dtype!r}, expected one of {', '.join(DTYPES)}")
    if resolved.adapter is not None:
        raise UsageError(
            f"--engine vllm: {resolved.name} is an adapter; vLLM serves whole weights. Merge it "
            f"first: vlmtune merge {resolved.name} --out DIR"
        )
    if resolved.contract is not None and resolved.contract.quantization is not None:
        raise UsageError(
            f"--engine vllm: {resolved.name} is held in few bits "
            f"({resolved.contract.quantization.method}) as vlmtune does it, and vLLM would hold it "
            "otherwise; serve it without --engine"
        )
    for option, value in (
        ("--device", loading.device),
        ("--device-map", loading.device_map),
        ("--quantization", loading.quantization),
    ):
        if value is not None:
            raise UsageError(
                f"{option}: vLLM places the weights itself; leave it out, and say what vLLM is to "
                "do in --vllm-config"
            )


def _encoder(resolved: Resolved, image: ImagePolicy | None) -> Encoder:
    folder, contract = str(resolved.base.folder), resolved.contract
    family = load_family(folder, contract.processor.backend if contract else "pil")
    if contract is None:
        contract = make_contract(family, resolved.base.identity(), image or ImagePolicy())
    else:
        verify_contract(contract, family, contract.base.weights_sha256)
    return Encoder(family, contract)
