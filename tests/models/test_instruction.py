"""Words before the images: the same in training, in predict and after a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_rows import SMALL, asked, encoder_of, picture, row, turn
from vlmtune.data.conversation import Image, Text
from vlmtune.errors import ContractMismatchError
from vlmtune.models.contract import verify_contract
from vlmtune.verbs import predict as module
from vlmtune.verbs.predict import predict

BRIEF = "Answer briefly."


def contents(encoder: Any, conversation: Any) -> list[tuple[Any, ...]]:
    return [message.content for message in encoder.complete(conversation).messages]


@pytest.fixture
def encoder(tiny_base: Path) -> Any:
    return encoder_of(tiny_base, SMALL, instruction=BRIEF, prompt="What is this?")


def test_it_stands_before_the_images(encoder):
    user, answer = contents(encoder, asked("What is the total?", "4 $", picture()))
    assert user == (Text(BRIEF), Image(0), Text("What is the total?"))
    assert answer == (Text("4 $"),)
    # A question that the contract fills in comes behind, as without an instruction.
    only = row(turn("user", 0), turn("assistant", "x"), images=(picture(),))
    assert contents(encoder, only)[0] == (Text(BRIEF), Image(0), Text("What is this?"))


def test_words_that_are_there_already_stay_alone(encoder):
    said = row(turn("user", "Explain.", 0, "Why?"), turn("assistant", "x"), images=(picture(),))
    assert contents(encoder, said)[0] == (Text("Explain."), Image(0), Text("Why?"))
    assert contents(encoder, asked("No picture?", "x"))[0] == (Text("No picture?"),)
    behind = row(turn("user", "Look:", 0), turn("assistant", "x"), images=(picture(),))
    assert contents(encoder, behind)[0] == (Text("Look:"), Image(0))


def test_completing_twice_is_completing_once(encoder):
    once = encoder.complete(asked("What is the total?", "4 $", picture()))
    assert encoder.complete(once) == once


def test_it_is_in_the_tokens_and_in_the_contract(tiny_base, encoder):
    conversation = asked("What is the total?", "4 $", picture())
    written = row(
        turn("user", BRIEF, 0, "What is the total?"),
        turn("assistant", "4 $"),
        images=conversation.images,
    )
    plain = encoder_of(tiny_base, SMALL)
    assert encoder.tokens(conversation).ids.tolist() == plain.tokens(written).ids.tolist()
    assert encoder.tokens(conversation).ids.tolist() != plain.tokens(conversation).ids.tolist()
    (difference,) = plain.contract.model_copy(
        update={"prompt": encoder.contract.prompt}
    ).differences(encoder.contract)
    assert difference == f"instruction: None != {BRIEF}"
    verify_contract(encoder.contract, encoder.family, encoder.contract.base.weights_sha256)
    with pytest.raises(ContractMismatchError):
        verify_contract(encoder.contract, encoder.family, "1" * 64)


def test_predict_asks_as_in_training_or_as_told(
    make_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vlmtune.verbs.train import train

    recipe = make_recipe(data__instruction=BRIEF, training__max_steps=1)
    train(recipe, run_dir=tmp_path / "run")
    (tmp_path / "page.png").write_bytes(picture().data)
    seen: list[str] = []
    generate = module.generate

    def listening(model: Any, encoder: Any, questions: Any, **options: Any) -> Any:
        tokens = encoder.tokens(questions[0], ask=True)
        text = encoder.family.parts.tokenizer.decode(tokens.ids[~tokens.image_mask].tolist())
        seen.append(text)
        return generate(model, encoder, questions, **options)

    monkeypatch.setattr(module, "generate", listening)
    page = [tmp_path / "page.png"]
    predict(tmp_path / "run", page, "What is the total?", max_new_tokens=2)
    predict(tmp_path / "run", page, "Why?", instruction="Explain.", max_new_tokens=2)
    assert BRIEF in seen[0]
    assert seen[0].index(BRIEF) < seen[0].index("What is the total?")
    assert BRIEF not in seen[1]
    assert seen[1].index("Explain.") < seen[1].index("Why?")
