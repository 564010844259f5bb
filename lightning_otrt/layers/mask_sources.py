"""Where the padding mask of a layer comes from. Plain data; ``reading/masks/search.py`` finds it in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

__all__ = ["OF_TARGET", "LayerMasks", "MaskSource", "TracedMask", "choose_masks"]

#: How arguments begin that belong to the sequence of a decoder.
OF_TARGET = ("decoder", "tgt", "target")


@dataclass(frozen=True)
class MaskSource:
    """An argument of a module that holds a padding mask ``(B, T)``.

    Args:
        module: Name of the module whose forward gets it.
        argument: Name of the argument in the signature of that forward.
        true_at: What its true elements are: ``"valid"`` tokens or ``"padding"``; ``"unknown"`` where its name does not
            tell. ``"label"``: it holds labels, which are -100 where there is none.
        method: Name of the method that is called in place of the forward.
        is_named: Whether the user named it, and so says what its elements mean.
        is_pairwise: Whether it said in the traced forward which token sees which, as ``(B, 1, T, T)`` does. What none
            sees is padding.
        is_turned: Whether its name says the opposite of ``true_at``. Read by its name, the mask of the traced forward
            left no token of any sample, or was true at all later tokens.
        is_full: Whether it left out nothing in the traced forward, and it is not known whether it is the mask of the
            layer. It is not used; a warning says when it leaves out tokens.
    """

    module: str
    argument: str
    true_at: str
    method: str = "forward"
    is_named: bool = False
    is_pairwise: bool = False
    # Not in the text, which stands for the masks in the names of caches: `true_at` says all that is read.
    is_turned: bool = field(default=False, repr=False)
    is_full: bool = field(default=False, repr=False)

    @property
    def described(self) -> str:
        """Its argument, with what true means where the name says the opposite.

        Example:
            >>> MaskSource("encoder", "attention_mask", "padding", is_turned=True).described
            'attention_mask (true at padding)'
        """
        place = "padding" if self.true_at == "padding" else "valid tokens"
        return f"{self.argument} (true at {place})" if self.is_turned else self.argument

    @property
    def is_of_target(self) -> bool:
        """Whether it belongs to the sequence of a decoder."""
        return self.argument.startswith(OF_TARGET) or self.true_at == "label"


@dataclass(frozen=True)
class TracedMask:
    """What the traced forward showed of a mask.

    Args:
        source: Where it is.
        shape: ``(B, T)``, or None where the argument was not given.
        frames: Number of frames that the module makes of ``T`` samples of a signal, where it tells.
        problem: Why its elements cannot be read, ``""`` where they can.
        empty: Number of samples in which it leaves no token.
        padded: Number of samples in which it leaves out a token.
        padded_images: Number of samples of which it leaves out edges, read as a mask ``(B, H, W)``.
        is_doubtful: Whether the layer may hold another sequence than the mask.
        longest: The largest of lengths that stand in place of a mask; 1 where they are shares of the longest.
        shown_by: What shows it where no argument has the name of a mask: ``"ids"`` of an embedding, the
            ``"pad_token"`` of a configuration, ``"labels"`` that are missing, ``"nan"``, ``"zeros"``, flags
            ``"inside"`` of a tuple, flags that an ``"inner"`` module gets or keeps as an ``"attribute"``,
            ``"lengths"``, or flags of a name of ``"unknown"`` meaning; ``"triangle"`` for a causal mask of an unknown
            meaning; ``"length"`` for a mask of another length that is found by the sequence of the layer; ``""`` for
            other masks.
        place: Where ids, NaN and zeros show it: at ``"the start"``, ``"the end"`` or ``"both ends"`` of samples.
        of_decoder: Whether ids that are used inside of a decoder show it.
    """

    source: MaskSource
    shape: tuple[int, ...] | None
    frames: int | None = None
    problem: str = ""
    empty: int = 0
    padded: int = 0
    padded_images: int = 0
    is_doubtful: bool = False
    longest: int = 0
    shown_by: str = ""
    place: str = ""
    of_decoder: bool = False

    @property
    def is_of_target(self) -> bool:
        """Whether it belongs to the sequence of a decoder."""
        # Labels beside ids are those of the ids, whatever their name.
        return self.of_decoder or (self.shown_by != "labels" and self.source.is_of_target)


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer.

    Args:
        sources: Where its mask may come from, the nearest first.
        used: The one that the traced forward had, None where there was none.
        misfit: A mask of another length, where none has the length of the layer.
        absent: The one that the user named, where the network did not get it.
        unread: An argument of the network that may be its mask, where none is found. Its name does not tell what true
            means.
        on_grid: A mask that leaves out tokens of a layer whose tokens are read as a map, which has no padding.
        drops_prefix: Whether the mask leaves out the prefix tokens of the layer.
        flat: A mask that leaves out tokens where the tokens of all samples lie along one axis.
        on_map: A mask, or lengths, that leaves out positions of the input where the layer is a map, whose padding is
            read.
    """

    sources: tuple[MaskSource, ...] = ()
    used: TracedMask | None = None
    misfit: TracedMask | None = None
    absent: TracedMask | None = None
    unread: TracedMask | None = None
    on_grid: TracedMask | None = None
    drops_prefix: bool = False
    flat: TracedMask | None = None
    on_map: TracedMask | None = None


def choose_masks(
    found: Sequence[TracedMask], samples: int, tokens: int, prefix: int, *, time_first: bool
) -> LayerMasks:
    """The masks of a layer that gave ``tokens`` tokens of ``samples`` samples.

    A mask that the traced forward did not get stays a source: a later batch may have padding.

    Args:
        found: The masks of its sequence, the nearest first.
        samples: Number of samples.
        tokens: Number of tokens, a prefix included.
        prefix: Number of prefix tokens that the network declares.
        time_first: Whether the layer is ``(T, B, C)``; a mask may then be ``(T, B)``.

    Example:
        >>> near = TracedMask(MaskSource("encoder", "attention_mask", "valid"), (8, 6))
        >>> far = TracedMask(MaskSource("", "attention_mask", "valid"), (8, 90))
        >>> choose_masks([near, far], 8, 6, 0, time_first=False).used.source.module
        'encoder'
    """
    lengths = {tokens, tokens - prefix}
    sources: list[MaskSource] = []
    full: list[MaskSource] = []
    misfit: TracedMask | None = None
    unread: TracedMask | None = None
    for mask in found:
        if mask.shown_by == "length":
            misfit = misfit or mask
            continue
        if mask.shape is None:
            sources.append(mask.source)
        if mask.shape is None:
            continue
        has_samples = mask.shape[0] == samples
        fits = has_samples and (mask.shape[1] in lengths or mask.frames == tokens)
        if not mask.padded and (mask.is_doubtful or mask.source.true_at == "unknown"):
            if fits and not mask.source.is_pairwise:
                full.append(replace(mask.source, true_at="unknown", is_full=True))
            continue
        if mask.source.true_at == "unknown":
            unread = unread or (mask if fits else None)
            continue
        if not fits and not (time_first and mask.shape[0] in lengths and mask.shape[1] == samples):
            # Labels of another length, such as several classes of each sample, are not those of positions.
            misfit = misfit or (mask if has_samples and mask.source.true_at != "label" else None)
            continue
        if mask.is_doubtful or (mask.source.is_pairwise and mask.problem):
            unread = unread or mask
            continue
        drops_prefix = prefix > 0 and has_samples and mask.shape[1] == tokens - prefix
        return LayerMasks((*sources, mask.source), used=mask, drops_prefix=drops_prefix)
    return LayerMasks((*sources, *full), misfit=misfit, unread=unread)
