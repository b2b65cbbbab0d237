"""``merge``: plain weights that any engine serves, proven to be what was trained."""

from __future__ import annotations

import gc
import glob
import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Text
from vlmtune.errors import MergeError, RefusedError, UsageError
from vlmtune.files import sync
from vlmtune.models.contract import Contract
from vlmtune.models.encode import Encoder
from vlmtune.models.generate import generate
from vlmtune.models.gptq import is_gptq
from vlmtune.models.load import DTYPES, LoadingConfig, load_model
from vlmtune.models.quantize import dequantize
from vlmtune.models.save import save_model
from vlmtune.runs.resolve import OpenModel, Resolved, base_of, open_model, resolve
from vlmtune.tuning.apply import Tuned, adapter_keys
from vlmtune.tuning.merge import (
    adapts_tied_head,
    changed,
    digests,
    merge_adapter,
    require_changed,
    untie_head,
)
from vlmtune.verbs.merged_card import write_merged_card
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.push import destination_of, pushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the largest logit, in fp32: summing in another order, nothing more
PROBE_TOKENS = 16
ONTO = ("dequantised", "original")


def merge(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str = "5GB",
    base: str | None = None,
    device: str | None = None,
    onto: str | None = None,
    push: str | None = None,
    push_hub: str = "huggingface",
    private: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write adapter + base (or a fully tuned model) as plain weights, and prove them equal.

    Args:
        model: A run, a checkpoint or an adapter.
        out: Folder to make.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None: the base's own, bf16 where it was quantised.
        shard_size: Largest safetensors file.
        base: Where the base is now, if it moved.
        device: Where to compute the proof; None: a GPU if there is one.
        onto: Of what was trained over a quantised base: ``dequantised`` (what was trained), or
            ``original``, whose difference from it is measured. None: ``dequantised``.
        push: ``owner/name`` on a hub to send the merged folder to, after the proof.
        push_hub: ``huggingface`` or ``modelscope``.
        private: Whether nobody else may see what is pushed.
        observer: Who is told how it goes.

    Returns:
        The keys of ``vlmtune merge --json``.

    Raises:
        MergeError: If the proof fails; nothing is published then.
        RefusedError: If ``out`` holds something already, or the base is packed by GPTQ.
        HubError: If the push fails; the merged folder stays.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"--out: {folder} is not empty; choose another folder")
    resolved = resolve(model, base=base)
    if resolved.contract is None:
        raise UsageError(
            f"MODEL: {model} is a plain model: there is nothing to merge. Give a run, a checkpoint "
            "or an adapter"
        )
    if is_gptq(resolved.base.folder):
        raise RefusedError(
            f"MODEL: {model} was trained over {resolved.base.id}, whose weights are packed in 4 "
            "bits by GPTQ. Adding an adapter to them means packing them anew: every weight would "
            "be rounded again, and the result is not what was trained. Give the adapter itself to "
            "eval, predict or serve, which put it over the packed base; or train over the plain "
            "model with tuning.method=qlora, whose adapters merge"
        )
    observer = observer or Observer()
    destination = destination_of(push, push_hub, private)
    loading = LoadingConfig(dtype="fp32", device=device)
    work = _Merge(resolved, folder, observer, base, loading, _onto(resolved, onto))
    result = work.write(dtype, shard_size)
    return result | pushed(folder, destination, observer)


class _Merge:
    def __init__(
        self,
        resolved: Resolved,
        out: Path,
        observer: Observer,
        base: str | None,
        loading: LoadingConfig,
        onto: str | None,
    ) -> None:
        assert resolved.contract is not None
        self.resolved, self.out, self.observer = resolved, out, observer
        self.contract, self.base = resolved.contract, base
        # The proof is taken in fp32: in bf16 the rounding would hide a wrong merge.
        self.loading, self.onto = loading, onto

    def write(self, dtype: str | None, shard_size: str) -> dict[str, Any]:
        stored = _stored_dtype(self.resolved, dtype)
        before = self._base_digests(stored)
        probe = probe_conversation()
        trained = self._ask_quantised(probe) if self.onto is not None else None
        self.observer.stage("loading the tuned model")
        tuned = self._open_tuned()
        expected, spoken = _ask(tuned.model, tuned.encoder, probe)
        if trained is not None and self.onto == "dequantised":
            _require_equal(trained[0], expected, "dequantising the base")
        self.observer.stage("merging")
        merged = merge_adapter(Tuned(tuned.model, tuned.adapter))
        in_memory = _logits(merged, tuned.encoder, probe)
        _require_equal(expected, in_memory, "merging in memory")
        after = digests(merged, stored)
        counts = changed(before, after, tuned.encoder.family.facts)
        require_changed(counts, self.contract.trained)
        self.observer.stage("writing")
        _remove_leftovers(self.out)
        temporary = self.out.with_name(f".{self.out.name}.{os.getpid()}.writing")
        try:
            self._save(merged, temporary, tuned, stored, shard_size)
            del merged
            again = self._reload(temporary)
            _require_written(after, digests(again.model, stored))
            found, said = _ask(again.model, again.encoder, probe)
            if stored == torch.float32:
                _require_equal(expected, found, "writing and reading back")
            proof = {"changed": counts, **_compared(trained or (expected, spoken), (found, said))}
            if self.onto is not None:
                proof["onto"] = self.onto
            write_merged_card(
                temporary, self.resolved, self.out.name, {**proof, "stored_as": str(stored)}
            )
            if self.out.exists():
                self.out.rmdir()
            temporary.rename(self.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(self.out.parent)
        return {"path": str(self.out), **proof}

    def _base_digests(self, stored: torch.dtype) -> dict[str, str]:
        self.observer.stage("reading the base")
        # The adapter's base was found already; a fully tuned model's contract names its own.
        source = self.resolved.base
        if self.resolved.adapter is None:
            source = base_of(self.contract, self.base)
        # Quantised where the tuned model will be: two devices may round a weight differently.
        quantised = self.onto == "dequantised"
        model = load_model(
            source.folder,
            dtype=torch.float32,
            device=self.loading.resolve()[0] if quantised else torch.device("cpu"),
            quantization=self.contract.quantization if quantised else None,
        )
        if quantised:
            dequantize(model)
        found = digests(model, stored)
        del model
        gc.collect()
        return found

    def _ask_quantised(self, probe: Conversation) -> tuple[Tensor, str]:
        """What was trained, as it was trained: the adapter over the base in few bits."""
        self.observer.stage("asking the quantised model")
        opened = open_model(self.resolved, self.loading)
        answer = _ask(opened.model, opened.encoder, probe)
        del opened
        gc.collect()
        return answer

    def _open_tuned(self) -> OpenModel:
        before = None
        if self.resolved.adapter is not None:
            keys = adapter_keys(self.resolved.adapter)

            def before(model: PreTrainedModel) -> None:
                if self.onto == "dequantised":
                    dequantize(model)
                if adapts_tied_head(model, keys):
                    untie_head(model)

        loading = self.loading
        if self.onto == "original":
            loading = loading.model_copy(update={"quantization": "none"})
        return open_model(self.resolved, loading, before_adapter=before)

    def _save(
        self,
        merged: PreTrainedModel,
        folder: Path,
        tuned: OpenModel,
        stored: torch.dtype,
        shard_size: str,
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        merged.to(dtype=stored)  # type: ignore[call-arg]
        save_model(
            merged,
            folder,
            family=tuned.encoder.family,
            contract=self._plain_contract(),
            base=self.resolved.base.folder,
            shard_size=shard_size,
        )

    def _plain_contract(self) -> Contract:
        """The contract of the merged weights, which are held in no few bits any more."""
        return self.contract.model_copy(update={"quantization": None})

    def _reload(self, folder: Path) -> OpenModel:
        """Load what lies on the disk as a user will."""
        self.observer.stage("proving")
        gc.collect()
        again = open_model(resolve(folder), self.loading)
        if again.encoder.contract != self._plain_contract():
            raise MergeError("the contract beside the merged model is not the trained one")
        return again


def probe_conversation() -> Conversation:
    """A fixed picture and question, for comparing models."""
    from PIL import Image as Pictures
    from PIL import ImageDraw

    picture = Pictures.new("RGB", (224, 112), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((16, 16, 96, 96), fill=(200, 30, 30))
    draw.rectangle((120, 24, 208, 88), outline=(20, 60, 160), width=6)
    draw.text((130, 48), "x = 1/2", fill="black")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    turn = Message("user", (Image(0), Text("What do you see in this picture? 图中是什么？")))
    answer = Message("assistant", (Text("A circle and x = 1/2 in a box."),))
    return Conversation("probe", (turn, answer), (EncodedImage(stream.getvalue()),))


def _ask(model: PreTrainedModel, encoder: Encoder, probe: Conversation) -> tuple[Tensor, str]:
    spoken = generate(model, encoder, [probe], max_new_tokens=PROBE_TOKENS)[0].text
    return _logits(model, encoder, probe), spoken


@torch.no_grad()
def _logits(model: PreTrainedModel, encoder: Encoder, probe: Conversation) -> Tensor:
    """Logits of every answer token, ``(labels, vocabulary)``, fp32 on the CPU."""
    from vlmtune.batching.collate import pack
    from vlmtune.training.loss import label_logits

    batch = pack(encoder.family, [encoder.encode(probe)]).to(model.device)
    return label_logits(model, encoder.family, batch).float().cpu()


def _compared(meant: tuple[Tensor, str], found: tuple[Tensor, str]) -> dict[str, Any]:
    """How far two models' answers to the probe differ: logits and greedy text of each."""
    return {
        "max_logit_difference": float((meant[0] - found[0]).abs().max()),
        "greedy_equal": meant[1] == found[1],
    }


def _onto(resolved: Resolved, asked: str | None) -> str | None:
    """Which weights the adapter is added to; None where there is one base only."""
    assert resolved.contract is not None
    if asked not in (None, *ONTO):
        raise UsageError(f"--onto: found {asked!r}, expected one of {', '.join(ONTO)}")
    if resolved.adapter is None or resolved.contract.quantization is None:
        if asked is not None:
            raise UsageError(
                f"--onto: {resolved.name} was not trained over a quantised base: there is one base "
                "to merge onto. Leave the option out"
            )
        return None
    return asked or "dequantised"


def _remove_leftovers(out: Path) -> None:
    """Delete what earlier merges into the same folder left when they were killed."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.writing"):
        number = leftover.name.split(".")[-2]
        if not number.isdigit():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            continue  # another user's merge, at work


def _require_written(meant: dict[str, str], found: dict[str, str]) -> None:
    """Every tensor on the disk, bit for bit: the probe's logits do not see each of them."""
    wrong = sorted(
        name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name)
    )
    if wrong:
        raise MergeError(
            f"{len(wrong)} tensors were read back otherwise than they were written, first: "
            f"{wrong[:3]}. Check the disk. Nothing was published"
        )


def _require_equal(expected: Tensor, found: Tensor, when: str) -> None:
    difference = float((expected - found).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not difference <= TOLERANCE * scale:
        raise MergeError(
            f"{when} changed the model: logits differ by {difference:.3g} (at most "
            f"{TOLERANCE * scale:.3g} is rounding). Nothing was written"
        )


def _stored_dtype(resolved: Resolved, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"--dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if resolved.contract is not None and resolved.contract.quantization is not None:
        return torch.bfloat16
    from vlmtune.models.folder import load_config

    own = load_config(str(resolved.base.folder)).dtype
    return own if isinstance(own, torch.dtype) else torch.float32
