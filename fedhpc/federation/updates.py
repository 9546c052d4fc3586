"""What is wrong with a client's reply: values that are no numbers, names and shapes of its own."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedhpc.federation import compat
from fedhpc.federation.cohort import Answer
from fedhpc.federation.conventions import records_of
from fedhpc.federation.mapped import layout_of

_Name = tuple[str, str]  # of a record, and of what is in it
_Layout = dict[_Name, tuple[str, tuple[int, ...]]]  # types and shapes


def is_train(message_type: str) -> bool:
    """Return whether a client is asked to train: "train", or "train." and a name of the app's."""
    return message_type.partition(".")[0] == "train"


def non_finite(reply: RecordDict, sent: Callable[[], RecordDict]) -> str:
    """Return what is said of NaN and Inf in the arrays of a reply; "" if there are none.

    Infinities that the message held in the same places (a mask is an array of a model, too) are no
    fault of the client.

    Parameters
    ----------
    reply : RecordDict
        A client's.
    sent : callable
        Returns what was sent to it.
    """
    count, total, first = 0, 0, ""
    asked: RecordDict | None = None
    for record, arrays in records_of(reply, ArrayRecord).items():
        for name, array in arrays.items():
            if (values := _floats(array)) is None:
                continue
            total += values.size
            good = np.isfinite(values)
            if good.all():
                continue
            asked = sent() if asked is None else asked
            sent_arrays = records_of(asked, ArrayRecord).get(record)
            before = None if sent_arrays is None else sent_arrays.get(name)
            known = None if before is None else _floats(before)
            if known is not None and known.shape == values.shape:
                good |= np.isinf(values) & (known == values)
            if bad := int(values.size - good.sum()):
                count, first = count + bad, first or name
    return f"{count} of {total} values are NaN or Inf, first in '{first}'" if count else ""


def refused(answers: Sequence[Answer], *, compare_metrics: bool) -> list[Answer]:
    """Return errors in the place of those replies that do not go with the others.

    Parameters
    ----------
    answers : sequence of Answer
        Replies with content to messages of one type.
    compare_metrics : bool
        Whether names of metrics count too.
    """
    odd = odd_ones_out(
        [(answer.message.content, answer.reply.content) for answer in answers],
        arrays=is_train(answers[0].message.metadata.message_type),
        metrics=compare_metrics,
    )
    errors = []
    for i, reason in sorted(odd.items()):
        reply = compat.make_error_reply(answers[i].message, reason, raised=True)
        errors.append(replace(answers[i], reply=reply))
    return errors


def odd_ones_out(
    pairs: Sequence[tuple[RecordDict, RecordDict]], *, arrays: bool, metrics: bool
) -> dict[int, str]:
    """Return which replies do not go with the others of their cohort, and why.

    Where half of the replies or more have the arrays of the message that each answers, by names,
    types and shapes, the others are odd. Else those are odd that differ from more than half which
    agree with each other; in shapes only if these do not depend on the data. If no half agrees
    nobody is odd: it is for the strategy to say.

    Parameters
    ----------
    pairs : sequence of tuple
        What was sent to a client, and its reply.
    arrays, metrics : bool
        What to compare: arrays, names and lengths of metrics.
    """
    odd: dict[int, str] = {}
    if arrays:
        # Flower gives a cohort's messages the same content.
        asked = {id(sent): sent for sent, _ in pairs}
        layouts_sent = {key: _arrays_of(sent) for key, sent in asked.items()}
        odd |= _odd_arrays([(layouts_sent[id(sent)], _arrays_of(reply)) for sent, reply in pairs])
    if metrics:
        layouts = {i: _metrics_of(reply) for i, (_, reply) in enumerate(pairs) if i not in odd}
        odd |= _differences(layouts, _majority(layouts), "metrics")
    return odd


def _odd_arrays(pairs: list[tuple[_Layout, _Layout]]) -> dict[int, str]:
    changed = {
        i: _difference(sent, reply, "arrays")
        for i, (sent, reply) in enumerate(pairs)
        if reply != sent
    }
    if 2 * len(changed) <= len(pairs):
        return changed
    layouts = {i: reply for i, (_, reply) in enumerate(pairs)}
    named = _majority({i: _without_shapes(reply) for i, reply in layouts.items()})
    odd = _differences(layouts, named, "arrays")
    alike = _majority({i: layouts[i] for i in named})
    if any(_is_resized(*pairs[i]) for i in alike):
        return odd  # like the trees of XGBoost, which are as long as they are
    return _differences(layouts, alike, "arrays") if alike else odd


def _majority(layouts: dict[int, _Layout]) -> list[int]:
    """Return who has the same as more than half; nobody if no half agrees."""
    hashed = {i: frozenset(layout.items()) for i, layout in layouts.items()}
    for common, count in Counter(hashed.values()).most_common(1):
        if 2 * count > len(hashed):
            return [i for i, layout in hashed.items() if layout == common]
    return []


def _differences(layouts: dict[int, _Layout], right: list[int], what: str) -> dict[int, str]:
    """Return how others differ from those who are right."""
    return {
        i: _difference(layouts[right[0]], layout, what)
        for i, layout in layouts.items()
        if right and i not in right
    }


def _without_shapes(layout: _Layout) -> _Layout:
    return {name: (dtype, ()) for name, (dtype, _) in layout.items()}


def _is_resized(sent: _Layout, reply: _Layout) -> bool:
    return any(name in sent and sent[name][1] != shape for name, (_, shape) in reply.items())


def _difference(wanted: _Layout, found: _Layout, what: str) -> str:
    """Say where a layout differs from the one that was wanted."""
    said = [f"no '{name}'" for record, name in wanted if (record, name) not in found]
    said += [
        f"'{name}' that nobody wants" for record, name in found if (record, name) not in wanted
    ]
    said += [
        f"'{name[1]}' as {_describe(found[name])} instead of {_describe(layout)}"
        for name, layout in wanted.items()
        if name in found and found[name] != layout
    ]
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    return f"the {what} of the reply are not those expected: {', '.join(said[:3])}{more}"


def _describe(layout: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = layout
    return f"{dtype} {shape}" if dtype else f"a list of {shape[0]}" if shape else "a number"


def _arrays_of(records: RecordDict) -> _Layout:
    return {
        (name, key): described
        for name, arrays in records_of(records, ArrayRecord).items()
        for key, described in layout_of(arrays).items()
    }


def _metrics_of(records: RecordDict) -> _Layout:
    return {
        (record, name): ("", (len(value),) if isinstance(value, list) else ())
        for record, metrics in records_of(records, MetricRecord).items()
        for name, value in metrics.items()
    }


def _floats(array: Array) -> np.ndarray | None:
    """Return a view of the values of an array of numbers with NaN and Inf, in any order."""
    if array.stype != "numpy.ndarray":
        return None
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        return None
    if dtype.kind not in "fc":
        return None
    data = array.data
    start = len(data) - math.prod(array.shape) * dtype.itemsize  # behind npy's header
    return None if start < 0 else np.frombuffer(data, dtype, offset=start)
