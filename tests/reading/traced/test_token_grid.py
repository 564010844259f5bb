"""Tokens as the cells of a grid: patches, merged patches, and a part of them that is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.layers.mask_sources import LayerMasks
from lightning_otrt.reading.hooks.readers import TracedRead, layer_reader, token_layout
from lightning_otrt.reading.traced.token_grid import TokenGrid, find_token_grid, has_hidden_grid
from lightning_otrt.reading.tracer import trace


def grid_of(model: nn.Module, name: str, *args: Tensor) -> TokenGrid:
    found = trace(model, args)
    layer = found.layer(name)
    assert layer.output is not None
    return find_token_grid(found, layer, layer.output)


class Patches(nn.Module):
    """A patch embedding, ``forward`` of a subclass on the tokens, and two layers behind it."""

    def __init__(self, widths: tuple[int, int] = (6, 8)) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(widths[0])
        self.linear = nn.Linear(*widths)

    def select(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.linear(self.norm(self.select(self.embed(images).flatten(2).mT)))
        return tokens.mean(1)


class Merged(Patches):
    """Squares of 2 x 2 patches, concatenated along the channels, on a grid of 4 x 6."""

    def select(self, tokens: Tensor) -> Tensor:
        batch, _, width = tokens.shape
        squares = tokens.view(batch, 2, 2, 3, 2, width).transpose(2, 3)
        return squares.reshape(batch, 6, 4 * width)


class Kept(Patches):
    """A quarter of the patches, in random order."""

    def select(self, tokens: Tensor) -> Tensor:
        return tokens[:, torch.randperm(tokens.shape[1])[: tokens.shape[1] // 4]]


class WithTokens(Patches):
    """Learned tokens under some name, before or behind the patches."""

    def __init__(self, name: str, shape: tuple[int, ...], *, in_front: bool = True) -> None:
        super().__init__()
        setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.name, self.in_front = name, in_front

    def select(self, tokens: Tensor) -> Tensor:
        learned = getattr(self, self.name).reshape(1, -1, 6).expand(len(tokens), -1, -1)
        return torch.cat([learned, tokens] if self.in_front else [tokens, learned], 1)


class WithMean(Patches):
    """The mean of all patches in front, as in the attention pooling of CLIP's ResNets."""

    def select(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


IMAGES = torch.randn(2, 3, 8, 12)


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_patches(name: str) -> None:
    assert grid_of(Patches(), name, IMAGES) == TokenGrid(0, (4, 6), "embed")


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_merged_patches(name: str) -> None:
    assert grid_of(Merged((24, 12)), name, IMAGES) == TokenGrid(0, (2, 3), "embed", merged=2)


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_a_part_of_the_patches_is_no_grid(name: str) -> None:
    """Also where a layer behind it has another width."""
    assert grid_of(Kept((6, 24)), name, IMAGES) == TokenGrid(0, part_of=(4, 6))


NAMES = ["cls_token", "class_embedding", "cls", "cls_tok", "class_emb", "dist_token", "query", "summary"]


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_one_token_in_front_under_any_name(name: str, shape: tuple[int, ...]) -> None:
    assert grid_of(WithTokens(name, shape), "linear", IMAGES) == TokenGrid(1, (4, 6), "embed")


def test_one_token_in_front_without_a_parameter() -> None:
    assert grid_of(WithMean(), "linear", IMAGES) == TokenGrid(1, (4, 6), "embed")


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (4, 1, 6)])
@pytest.mark.parametrize("name", ["register_tokens", "reg_token", "registers", "class_tokens"])
def test_several_tokens_in_front(name: str, shape: tuple[int, ...]) -> None:
    assert grid_of(WithTokens(name, shape), "linear", IMAGES) == TokenGrid(4, (4, 6), "embed")


@pytest.mark.parametrize("in_front", [False, True])
def test_several_tokens_of_other_names_may_stand_anywhere(in_front: bool) -> None:
    model = WithTokens("prompts", (4, 6), in_front=in_front)
    assert grid_of(model, "linear", IMAGES) == TokenGrid(0, more_than=(4, 6))
    read = TracedRead("student", trace(model, (IMAGES,)), "linear", 2)
    with pytest.warns(UserWarning, match="'linear' has 28 tokens, 4 more than the grid of 4 x 6 patches before it"):
        reader = layer_reader(read, token_layout(read, LayerMasks()), 4)
    assert (reader.prefix_tokens, reader.token_grid) == (0, None)


class WithMeans(Patches):
    """Some means of the patches behind them, which no parameter shows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def select(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, tokens.mean(1, keepdim=True).expand(-1, self.count, -1)], 1)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_few_tokens_without_a_parameter_may_stand_anywhere(count: int) -> None:
    assert grid_of(WithMeans(count), "linear", IMAGES) == TokenGrid(0, more_than=(4, 6))


def test_many_tokens_without_a_parameter_are_another_sequence() -> None:
    assert grid_of(WithMeans(17), "linear", IMAGES) == TokenGrid()


class Queries(nn.Module):
    """Queries that look at the patches and are no patches, however many they are."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.embed, self.count = nn.Conv2d(3, 6, 2, stride=2), count
        self.linear = nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        queries = patches.mean(1, keepdim=True) * torch.arange(1.0, self.count + 1)[:, None]
        return self.linear(queries, patches)


@pytest.mark.parametrize("count", [1, 5, 25, 28])
def test_queries_are_no_patches(count: int) -> None:
    assert grid_of(Queries(count), "linear", IMAGES) == TokenGrid()


class TextAttention(nn.Module):
    """Tokens of a text, and a convolution that makes 24 x 16 numbers of them, as in Nystromformer."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.embed, self.linear, self.over = nn.Embedding(20, 32), nn.Linear(32, 32), over
        self.conv = nn.Conv2d(2, 2, (5, 1), padding=(2, 0)) if over == "heads" else nn.Conv2d(1, 2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.over == "heads":
            mixed = self.conv(x.unflatten(2, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(2)
        else:  # the scores of attention
            mixed = self.conv((x @ x.mT)[:, None]).mean(1) @ x
        return self.linear(x + mixed)


@pytest.mark.parametrize(("over", "tokens"), [("heads", 24), ("heads", 16), ("scores", 16), ("scores", 25)])
def test_a_convolution_over_attention_makes_no_grid_of_a_text(over: str, tokens: int) -> None:
    assert grid_of(TextAttention(over), "linear", torch.randint(0, 20, (2, tokens))) == TokenGrid()


class Spectrogram(nn.Module):
    """Patches of an input without an axis of channels, and a convolution over tokens that lie on their grid."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.linear = nn.Conv2d(1, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(self.embed(x[:, None]).flatten(2).mT)
        return self.linear.forward(self.mix(tokens.mT.unflatten(2, (4, 6))).flatten(2).mT)


def test_spectrograms_have_patches() -> None:
    assert grid_of(Spectrogram(), "linear", torch.randn(2, 8, 12)) == TokenGrid(0, (4, 6), "embed")


def test_tokens_that_a_convolution_mixes_as_a_map_lie_on_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix, self.last = nn.Linear(3, 6), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)

        def forward(self, patches: Tensor) -> Tensor:
            return self.last(self.mix(self.first(patches).mT.unflatten(2, (4, 6))).flatten(2).mT)

    assert grid_of(Mixed(), "last", torch.randn(2, 24, 3)) == TokenGrid(0, (4, 6), "mix")


def test_more_tokens_than_a_few_are_another_sequence() -> None:
    class WithText(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.text, self.linear = nn.Conv2d(3, 6, 4, 4), nn.Linear(5, 6), nn.Linear(6, 6)

        def forward(self, images: Tensor, text: Tensor) -> Tensor:
            return self.linear(torch.cat([self.text(text), self.embed(images).flatten(2).mT], 1))

    found = trace(WithText(), (IMAGES, torch.randn(len(IMAGES), 30, 5)))
    output = found.layer("linear").output
    assert output is not None
    assert find_token_grid(found, found.layer("linear"), output) == TokenGrid()


class Captioner(nn.Module):
    """The patches of the last of two maps, 8 x 12 and 2 x 3, in front of some words, or behind them."""

    def __init__(self, *, first: str = "image", class_token: bool = False) -> None:
        super().__init__()
        self.stem, self.cnn = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 4, stride=4)
        self.words, self.linear, self.first = nn.Embedding(9, 6), nn.Linear(6, 8), first
        if class_token:
            self.summary = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        words = self.words(ids) if self.first == "words" else None
        patches = self.cnn(self.stem(images)).flatten(2).mT
        if hasattr(self, "summary"):
            patches = torch.cat([self.summary.expand(len(images), -1, -1), patches], 1)
        words = self.words(ids) if words is None else words
        return self.linear(torch.cat([patches, words], 1)).mean(1)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("first", ["image", "words"])
@pytest.mark.parametrize("count", [3, 13, 100])
def test_words_beside_the_patches(count: int, first: str, class_token: bool) -> None:
    """Few words are no tokens in front; with more there are more tokens than the first map has cells, or fewer."""
    model = Captioner(first=first, class_token=class_token)
    assert grid_of(model, "linear", IMAGES, torch.zeros(2, count, dtype=torch.long)) == TokenGrid()


def test_many_learned_tokens_beside_the_patches_are_told() -> None:
    assert grid_of(WithTokens("text", (30, 6)), "linear", IMAGES) == TokenGrid(more_than=(4, 6))


def test_vision_tower_of_clip() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config = transformers.CLIPVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    found = trace(transformers.CLIPVisionModel(config).eval(), (torch.randn(2, 3, 32, 32),))
    (layer,) = [layer for layer in found.layers if layer.name.endswith("encoder.layers.0")]
    assert layer.output is not None
    assert find_token_grid(found, layer, layer.output)[:2] == (1, (4, 4))


def test_swin() -> None:
    """Three stages, each with half of the rows and columns of the one before."""
    transformers = pytest.importorskip("transformers")
    model = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=2
        )
    ).eval()
    found = trace(model, (torch.randn(2, 3, 32, 32),))
    layers = [found.layer(f"encoder.layers.{stage}.blocks.0") for stage in range(3)]
    sizes = [find_token_grid(found, layer, layer.output).size for layer in layers if layer.output is not None]
    assert sizes == [(16, 16), (8, 8), (4, 4)]


class Frames(nn.Module):
    """Convolutions over a spectrogram, whose frames then hold the channels of all frequencies."""

    def __init__(self, frequencies: int, *, has_channel: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1))
        self.linear, self.has_channel = nn.Linear(6 * frequencies // 4, 8), has_channel

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x if self.has_channel else x[:, None])
        tokens: Tensor = self.linear(x.transpose(1, 2).flatten(2))
        return tokens


@pytest.mark.parametrize("has_channel", [False, True])
@pytest.mark.parametrize(("frequencies", "times"), [(16, 64), (16, 128), (64, 128), (20, 64)])
def test_frames_behind_convolutions_are_no_squares(frequencies: int, times: int, has_channel: bool) -> None:
    """With 16 of 64 frequencies left, a frame has as many channels as a square of 4 x 4 cells would."""
    shape = (2, 1, times, frequencies) if has_channel else (2, times, frequencies)
    assert grid_of(Frames(frequencies, has_channel=has_channel), "linear", torch.randn(shape)) == TokenGrid()


def test_a_speech_encoder() -> None:
    """Of transformers: 128 mels, of which convolutions leave 16."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=128,
        subsampling_conv_channels=4,
    )
    net = transformers.ParakeetEncoder(config)
    assert grid_of(net, "layers.0", torch.randn(2, 512, 128)) == TokenGrid()


class ChannelsLast(Patches):
    """A normalisation of the tokens in rows of another length, as in the order of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LayerNorm(6)

    def select(self, tokens: Tensor) -> Tensor:
        return self.rows(tokens.unflatten(1, (6, 4))).flatten(1, 2)


def test_the_map_of_a_convolution_goes_before_others_of_as_many_positions() -> None:
    for name in ("norm", "linear"):
        assert grid_of(ChannelsLast(), name, IMAGES) == TokenGrid(0, (4, 6), "embed")


class Squeezed(Patches):
    """A map of one position, as in squeeze and excitation, beside a few tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.squeeze, self.tokens = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1)), tokens

    def forward(self, images: Tensor) -> Tensor:
        maps = self.embed(images)
        scaled = (maps * self.squeeze(maps)).flatten(2).mT
        segments = scaled.flatten(1).unflatten(1, (-1, 6))[:, : 2 * self.tokens].unflatten(1, (self.tokens, 2)).mean(2)
        return self.linear(self.norm(segments)).mean(1)


@pytest.mark.parametrize("tokens", [2, 5])
def test_a_map_of_one_position_is_no_patch_beside_others(tokens: int) -> None:
    found = grid_of(Squeezed(tokens), "linear", torch.randn(2, 3, 2, 2).repeat(1, 1, 10, 10))
    assert found.more_than is None
    assert found.prefix == 0
    assert found.size is None


def test_many_learned_tokens_beside_the_patches_and_a_class_token() -> None:
    class Prompted(WithTokens):
        def __init__(self) -> None:
            super().__init__("prompts", (20, 6))
            self.cls_token = nn.Parameter(torch.randn(1, 1, 6))

        def select(self, tokens: Tensor) -> Tensor:
            tokens = super().select(tokens)
            return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)

    assert grid_of(Prompted(), "linear", IMAGES) == TokenGrid(1, more_than=(4, 6))


def test_latent_vectors_behind_a_class_token_are_no_part_of_the_patches() -> None:
    class Latents(WithTokens):
        def __init__(self) -> None:
            super().__init__("latents", (7, 6))
            self.cls_token = nn.Parameter(torch.randn(1, 1, 6))

        def select(self, tokens: Tensor) -> Tensor:
            latents = self.latents + tokens.mean(1, keepdim=True)
            return torch.cat([self.cls_token.expand(len(tokens), -1, -1), latents], 1)

    assert grid_of(Latents(), "linear", IMAGES) == TokenGrid(1)


def test_a_part_of_merged_patches_behind_several_class_tokens() -> None:
    class KeptOfMerged(Merged):
        def __init__(self) -> None:
            super().__init__((24, 8))
            self.cls_token, self.reg_token = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 4, 8))
            self.mix = nn.Linear(8, 8)

        def forward(self, images: Tensor) -> Tensor:
            merged = self.linear(self.norm(self.select(self.embed(images).flatten(2).mT)))
            kept = [self.cls_token.expand(2, -1, -1), self.reg_token.expand(2, -1, -1), merged[:, [4, 0, 3]]]
            return self.mix(torch.cat(kept, 1)).mean(1)

    assert grid_of(KeptOfMerged(), "mix", IMAGES) == TokenGrid(5, part_of=(2, 3))


@pytest.mark.parametrize(("side", "is_hidden"), [(6, False), (4, True)])
def test_a_few_tokens_of_an_image_are_no_grid_that_is_missing(side: int, is_hidden: bool) -> None:
    class Cut(nn.Module):
        """Patches that code cuts out: four of them, or nine."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3 * side**2, 6)

        def forward(self, images: Tensor) -> Tensor:
            patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
            return self.embed(patches.flatten(3).flatten(1, 2)).mean(1)

    found = trace(Cut(), (torch.randn(2, 3, 12, 12),))
    layer = found.layer("embed")
    assert layer.output is not None
    assert has_hidden_grid(found, layer, layer.output) == is_hidden


class CutVit(nn.Module):
    """Patches that code cuts out, behind class and register tokens."""

    def __init__(self, registers: int = 4, width: int = 6) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(27, width), nn.Linear(width, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width)) if registers else None
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        declared = [tokens for tokens in (self.cls_token, self.register_tokens) if tokens is not None]
        tokens = [*(tokens.expand(len(images), -1, -1) for tokens in declared), self.embed(patches)]
        return self.head(self.mix(torch.cat(tokens, 1)).mean(1))


@pytest.mark.parametrize(("layer", "prefix"), [("embed", 0), ("mix", 5)])
def test_class_and_register_tokens_before_patches_that_code_cuts_out(layer: str, prefix: int) -> None:
    """They stand before those of later layers alone."""
    assert grid_of(CutVit(), layer, torch.randn(2, 3, 12, 12)) == TokenGrid(prefix)


def test_patches_that_code_cuts_out_behind_other_numbers_of_registers() -> None:
    """Without these both have as many patches: no warning, which would be an error, and these are matched."""
    student, teacher = CutVit(0, 4), CutVit(4, 6)
    images = torch.randn(8, 3, 12, 12)
    transfer = RepresentationTransfer(teacher, {"mix": "mix"}, weight=1.0, plan="uniform")
    with transfer.attached(student):
        student(images)
        found = transfer.loss()
    kept: list[Tensor] = []
    for net, prefix in ((student, 1), (teacher, 5)):
        handle = net.mix.register_forward_hook(lambda *seen, prefix=prefix: kept.append(seen[2][:, prefix:]))
        net(images)
        handle.remove()
    rows = [tokens.detach().double().flatten(0, 1).T for tokens in kept]
    correlation = torch.corrcoef(torch.cat(rows))[:4, 4:]
    torch.testing.assert_close(found.double(), (1 - correlation).mean(), rtol=1e-4, atol=0)


class OneHeadOfKeys(nn.Module):
    """Attention over words with several heads, one head of keys, and a norm of each, as Gemma 3 and Qwen 3 have."""

    def __init__(self, width: int, *, heads_first: bool) -> None:
        super().__init__()
        self.heads_first = heads_first
        self.embed, self.keys, self.norm = nn.Embedding(50, width), nn.Linear(width, 8), nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(width + 8, width), nn.Tanh())

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        keys = self.norm(self.keys(x).unsqueeze(1 if self.heads_first else 2)).flatten(1, 2)
        return self.block(torch.cat([x, keys], -1))


@pytest.mark.parametrize("heads_first", [True, False])
def test_one_head_of_keys_is_no_map_of_one_row(heads_first: bool) -> None:
    ids, mask = torch.randint(50, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    net = OneHeadOfKeys(12, heads_first=heads_first)
    found = trace(net, (ids, mask))
    assert found.layer("norm").output_shape == ((4, 1, 6, 8) if heads_first else (4, 6, 1, 8))
    layer = found.layer("block")
    assert layer.output is not None
    assert find_token_grid(found, layer, layer.output) == TokenGrid()


def test_padding_of_gemma_is_left_out_of_later_batches() -> None:
    """Its first batch has none. Then other words under the mask change nothing."""
    transformers = pytest.importorskip("transformers", minversion="4.50")

    def gemma(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "vocab_size": 50}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads))

    student, ids = gemma(16, 0), torch.randint(5, 50, (8, 32))
    mask = (torch.arange(32) < torch.randint(8, 33, (8, 1))).long()
    others = torch.where(mask.bool(), ids, torch.randint(5, 50, ids.shape))
    readings = []
    with (transfer := RepresentationTransfer(gemma(24, 1))).attached(student):
        for words, valid in ((ids, torch.ones_like(mask)), (ids, mask), (others, mask)):
            student(input_ids=words, attention_mask=valid)
            readings.append([reading.detach() for calls in transfer.views[0].student.values() for reading in calls])
            transfer.loss()
    assert readings[1]
    for one, other in zip(readings[1], readings[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
