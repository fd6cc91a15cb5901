"""How many different ranks or nodes a token's experts lie on, for routing that prefers no expert."""

from __future__ import annotations

from functools import lru_cache
from math import comb

from megatron_disagmoe.planner.model_spec import MixtureOfExperts


@lru_cache(maxsize=4096)
def expected_parts(moe: MixtureOfExperts, num_parts: int) -> float:
    """Expected number of different parts, of ``num_parts`` equal contiguous ones, among a token's k experts.

    With e = E / parts experts each, a part is missed with probability C(E - e, k) / C(E, k), so the expectation is
    parts (1 - C(E - e, k) / C(E, k)). Group-limited routing first picks ``topk_groups`` expert groups at random.

    Raises:
        ValueError: the experts do not divide over the parts.
    """
    if moe.num_experts % num_parts:
        raise ValueError(f"{moe.num_experts} experts do not divide over {num_parts}")
    share = moe.num_experts // num_parts
    group = moe.num_experts // moe.num_groups
    if share <= group and group % share == 0:
        chosen = moe.topk_groups / moe.num_groups
        return num_parts * chosen * (1 - _missed(moe.topk_groups * group, share, moe.top_k))
    if share % group == 0:
        return num_parts * (1 - _missed_groups(moe, groups_per_part=share // group, group=group))
    # Parts that cut across groups: as if routing knew no groups, which errs towards more parts.
    return num_parts * (1 - _missed(moe.num_experts, share, moe.top_k))


def _missed(num_experts: int, share: int, top_k: int) -> float:
    return comb(num_experts - share, top_k) / comb(num_experts, top_k)


def _missed_groups(moe: MixtureOfExperts, *, groups_per_part: int, group: int) -> float:
    """Probability that a part made of whole groups gets none: j of its groups are open, and no pick falls there."""
    total = 0.0
    for j in range(min(groups_per_part, moe.topk_groups) + 1):
        ways = comb(groups_per_part, j) * comb(moe.num_groups - groups_per_part, moe.topk_groups - j)
        if ways:
            missed = _missed(moe.topk_groups * group, j * group, moe.top_k)
            total += ways / comb(moe.num_groups, moe.topk_groups) * missed
    return total
