"""Learned prompts of PEFT: the teacher gets the ids that the PeftModel gets, and not the prompts of the student."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forwards.masked import LONGEST, SAMPLES, VALID, WORDS
from helpers import make_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_otrt import LayerPair, OTRTCallback, RepresentationTransfer, neurons, transport_distance

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROMPTS = 4
#: As many segments as the texts have positions.
GRID = 3
KINDS = {
    "prompt tuning": functools.partial(peft.PromptTuningConfig, num_virtual_tokens=PROMPTS),
    "P-tuning": functools.partial(peft.PromptEncoderConfig, num_virtual_tokens=PROMPTS, encoder_hidden_size=16),
}
LAYER = "bert.encoder.layer.1"


def make() -> nn.Module:
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **options, **dropout))


def wrapped(base: nn.Module, config: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it renames
        tuned: nn.Module = peft.get_peft_model(copy.deepcopy(base), config)
    return tuned


def with_prompts(kind: str, base: nn.Module) -> nn.Module:
    """The network with prompts that change what it computes."""
    tuned = wrapped(base, KINDS[kind](task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    return tuned


def call(net: nn.Module) -> Any:
    return net(input_ids=WORDS, attention_mask=VALID.long())


def rows(net: nn.Module, added: int) -> Tensor:
    """What the layer gives, averaged over segments of the tokens that are no padding."""
    found: list[Tensor] = []
    hook = net.get_submodule(LAYER).register_forward_hook(lambda _, args, output: found.append(output))
    call(net)
    hook.remove()
    mask = torch.cat([VALID.new_ones(SAMPLES, added), VALID], 1)
    return neurons(found[0] if isinstance(found[0], Tensor) else found[0][0], mask=mask, grid=GRID, neuron_axis=-1)


def recorded(transfer: RepresentationTransfer, student: nn.Module) -> tuple[float, str, list[str]]:
    """The term, the table, and what is warned of. The gradients of the term are those of the student."""
    tables: list[str] = []
    transfer.report = tables.append
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        call(student)
        transfer.loss().backward()
    messages = [str(each.message) for each in caught if each.category.__name__ == "TransferWarning"]
    return float(transfer.transport_value), tables[0], messages


@pytest.mark.parametrize("layers", ["auto", [LAYER], [LayerPair(LAYER, LAYER)]], ids=["auto", "name", "pair"])
@pytest.mark.parametrize("root", [None, ""], ids=["found", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_root_is_the_network_with_its_prompts(kind: str, root: str | None, layers: Any) -> None:
    teacher = make()
    student = with_prompts(kind, teacher)
    term, table, messages = recorded(
        RepresentationTransfer(teacher, layers, student_root=root, plan="identity"), student
    )
    assert term > 1e-3
    assert all(float(each.grad.abs().sum()) > 0 for each in student.prompt_encoder.parameters())
    prompts = len(list(student.prompt_encoder.parameters()))
    assert f"root: the whole student; {prompts} of {prompts + 2} trained tensors lie before" in table
    assert f"({SAMPLES}, {LONGEST + PROMPTS}, 16)" in table
    assert f"({SAMPLES}, {LONGEST}, 16)" in table
    assert [message[:41] for message in messages] == [f"The student adds {PROMPTS} more tokens to its inp"]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_by_hand(kind: str, side: str) -> None:
    base = make()
    tuned = with_prompts(kind, base)
    student, teacher = (tuned, base) if side == "student" else (base, tuned)
    student, teacher = student.eval(), teacher.eval()
    pair = LayerPair(LAYER, LAYER, neuron_axis=-1)
    transfer = RepresentationTransfer(teacher, [pair], plan="identity", grid=GRID)
    *_, messages = recorded(transfer, student)
    assert messages[0].startswith(f"The {side} adds {PROMPTS} more tokens")
    with torch.no_grad():
        own, given = (rows(net, PROMPTS if net is tuned else 0) for net in (student, teacher))
    expected = transport_distance(own, given, plan="identity")
    assert float(transfer.transport_value) == pytest.approx(float(expected.value), rel=1e-4)


class Task(pl.LightningModule):
    """Trains the prompts and the classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(self.net(input_ids=ids, attention_mask=mask).logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], 0.01)


@pytest.mark.parametrize("layers", ["auto", {f"net.{LAYER}": LAYER}], ids=["auto", "pair"])
@pytest.mark.parametrize("root", [None, "net"], ids=["found", "given"])
def test_in_a_trainer(root: str | None, layers: Any) -> None:
    teacher = make()
    data = TensorDataset(WORDS, VALID.long(), torch.arange(SAMPLES) % 2)
    callback = OTRTCallback(teacher, layers, student_root=root, plan="identity")
    trainer = make_trainer(callbacks=[callback])
    with pytest.warns(UserWarning, match=f"The student adds {PROMPTS} more tokens"):
        trainer.fit(Task(with_prompts("prompt tuning", teacher)), DataLoader(data, SAMPLES))
    assert float(trainer.callback_metrics["train/otrt"]) > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_prefixes_are_no_tokens(padded: bool) -> None:
    """The network gets them as states of an earlier forward, which the teacher must not go on from."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    base = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, **sizes, **dropout))
    prefixes = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PROMPTS)
    mask = VALID.long() if padded else torch.ones_like(WORDS)
    values = []
    student = wrapped(base, prefixes)
    for words in (WORDS, torch.where(mask == 1, WORDS, 7)):
        transfer = RepresentationTransfer(base, plan="identity")
        with transfer.attached(student):
            student(input_ids=words, attention_mask=mask)
            transfer.loss()
        values.append(float(transfer.transport_value))
    assert values[0] > 1e-3
    assert values[0] == pytest.approx(values[1], rel=1e-4)


ADAPTERS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    "DoRA": peft.LoraConfig(r=2, target_modules=["query"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["query", "value"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_mere_wrappers(name: str) -> None:
    base = make()
    student = wrapped(base, ADAPTERS[name])
    term, table, messages = recorded(RepresentationTransfer(base, [LAYER], plan="identity"), student)
    assert term == pytest.approx(0, abs=1e-5)
    assert f"{LAYER} (BertLayer)" in table
    assert messages == []


def test_what_peft_wraps_is_no_method() -> None:
    base = make()
    student = with_prompts("prompt tuning", base)
    with pytest.raises(ValueError, match=r"got 'base_model'\. Its children: \['bert', .*'prompt_encoder'"):
        RepresentationTransfer(base, student_root="base_model").attach(student)
