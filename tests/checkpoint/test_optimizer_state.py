"""The optimizer's common state: one step for both roles, and the form of another layout's optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_disagmoe.checkpoints.optimizer_state import (
    DISTRIBUTED,
    MIXED,
    PLAIN,
    State,
    index_main_parameters,
    kind,
    list_main_parameters,
    refit,
    share_step,
)

IDENTIFIERS = ("wd_mult", "lr_mult", "is_expert_parallel")


def group(wd_mult: float, *, expert: bool = False, **more: Any) -> dict[str, Any]:
    return {"wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": expert, "weight_decay": 0.1 * wd_mult, **more}


def plain(*groups: dict[str, Any], step: int | None = None) -> State:
    return {"state": {} if step is None else {"common_step": step}, "param_groups": list(groups)}


def mixed(*groups: dict[str, Any], main: list[list[str]], step: int | None = None) -> State:
    return {"optimizer": plain(*groups, step=step), "fp32_from_fp16_params": main}


def distributed(*groups: dict[str, Any]) -> State:
    return {"optimizer": {"param_groups": list(groups)}, "param_state_sharding_type": "fully_reshardable"}


DENSE = (group(1.0), group(0.0))


def test_kinds() -> None:
    assert kind(plain(*DENSE)) == PLAIN
    assert kind(mixed(*DENSE, main=[])) == MIXED
    assert kind(distributed(*DENSE)) == DISTRIBUTED
    assert kind({0: distributed(*DENSE), 1: distributed(group(1.0, expert=True))}) == DISTRIBUTED


class TestShareStep:
    """On an FFN rank the dense optimizer has seen no step; rank 0 is one, and writes for everybody."""

    def test_plain(self) -> None:
        state = {0: plain(*DENSE), 1: plain(group(1.0, expert=True), step=7)}
        share_step(state)
        assert [state[index]["state"] for index in (0, 1)] == [{"common_step": 7}] * 2

    def test_mixed(self) -> None:
        state = {0: mixed(*DENSE, main=[[], []], step=7), 1: mixed(group(1.0, expert=True), main=[[]])}
        share_step(state)
        assert state[1]["optimizer"]["state"] == {"common_step": 7}

    def test_in_the_groups(self) -> None:
        state = {0: distributed(*copy.deepcopy(DENSE)), 1: distributed(group(1.0, expert=True, step=7.0))}
        share_step(state)
        assert [one["step"] for one in state[0]["optimizer"]["param_groups"]] == [7.0, 7.0]

    @pytest.mark.parametrize("state", [plain(*DENSE), plain(*DENSE, step=3), distributed(*DENSE)])
    def test_nothing_to_share(self, state: State) -> None:
        before = copy.deepcopy(state)
        share_step(state)
        assert state == before


class TestRefit:
    EXPERT = group(1.0, expert=True)

    def test_the_same_form_is_left_alone(self) -> None:
        for state, wanted in (
            (plain(*DENSE, step=3), [DENSE]),
            ({0: plain(*DENSE, step=3), 1: plain(self.EXPERT, step=3)}, [DENSE, [self.EXPERT]]),
        ):
            assert refit(state, wanted, identifiers=IDENTIFIERS) is state

    def test_one_optimizer_becomes_two(self) -> None:
        """EP=1 or N=1, where experts are stepped with the rest, into EP>1 or N>1."""
        state = plain(group(1.0, lr=0.3), group(0.0, lr=0.4), step=3)
        assert refit(state, [DENSE, [self.EXPERT]], identifiers=IDENTIFIERS) == {
            0: plain(group(1.0, lr=0.3), group(0.0, lr=0.4), step=3),
            1: plain(group(1.0, expert=True, lr=0.3), step=3),
        }

    def test_two_optimizers_become_one(self) -> None:
        state = {0: plain(*DENSE, step=3), 1: plain(self.EXPERT, step=3)}
        assert refit(state, [DENSE], identifiers=IDENTIFIERS) == plain(*DENSE, step=3)

    def test_a_group_that_only_experts_had(self) -> None:
        state = {0: plain(group(0.0), step=3), 1: plain(self.EXPERT, step=3)}
        assert refit(state, [DENSE], identifiers=IDENTIFIERS) == plain(*DENSE, step=3)

    def test_dense_groups_come_before_those_of_experts(self) -> None:
        state = {0: plain(group(1.0, lr=0.3)), 1: plain(group(1.0, expert=True, lr=0.9))}
        [one] = refit(state, [[group(1.0)]], identifiers=IDENTIFIERS)["param_groups"]
        assert one["lr"] == 0.3

    def test_distributed(self) -> None:
        state = distributed(group(1.0, step=3), group(0.0, step=3))
        found = refit(state, [DENSE, [self.EXPERT]], identifiers=IDENTIFIERS)
        assert found[1] == distributed(group(1.0, expert=True, step=3))

    def test_the_saved_state_is_not_changed(self) -> None:
        state = plain(*copy.deepcopy(DENSE), step=3)
        before = copy.deepcopy(state)
        refit(state, [DENSE, [self.EXPERT]], identifiers=IDENTIFIERS)
        assert state == before

    def test_a_group_without_its_like_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"no group of parameters with wd_mult 0\.5, lr_mult 1\.0; it has wd_mult"):
            refit(plain(*DENSE), [[group(0.5)]], identifiers=IDENTIFIERS)


class TestMainParameters:
    """Megatron cannot merge lists of other lengths, and the lists of a role's optimizers may be empty."""

    def test_round_trip(self) -> None:
        state = {
            0: mixed(*DENSE, main=[[], ["c", "d"]]),
            1: mixed(group(1.0, expert=True), main=[[]]),
        }
        original = copy.deepcopy(state)
        index_main_parameters(state)
        assert state[0]["fp32_from_fp16_params"] == {1: {0: "c", 1: "d"}}
        assert "fp32_from_fp16_params" not in state[1]
        list_main_parameters(state)
        assert state == original

    def test_ten_and_more_stay_in_order(self) -> None:
        state = mixed(group(1.0), main=[list("abcdefghijklm")])
        index_main_parameters(state)
        state["fp32_from_fp16_params"][0] = dict(reversed(state["fp32_from_fp16_params"][0].items()))
        list_main_parameters(state)
        assert state["fp32_from_fp16_params"] == [list("abcdefghijklm")]

    @pytest.mark.parametrize("state", [plain(*DENSE, step=3), distributed(*DENSE)])
    def test_other_kinds_have_none(self, state: State) -> None:
        before = copy.deepcopy(state)
        index_main_parameters(state)
        list_main_parameters(state)
        assert state == before
