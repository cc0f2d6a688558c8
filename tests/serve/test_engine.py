"""The loop of the engine: what it takes, lets go of, and survives."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki.cli.demo import sapling
from niwaki.data.texts import load_tokenizer
from niwaki.runtime.contextual.attach import attach
from niwaki.serve.engine import MAX_FAILURES, Engine, EngineLimits
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.jobs import Decoded, Event, Failed, Finished, Job, Prefilled, Started
from niwaki.serve.prometheus import Metrics
from niwaki.serve.sampling import Sampling
from support.contextual import PROMPT, model_of, shadow_of
from support.families import build, families
from support.servers import until

IDS = [5, 9, 13, 17, 21]


class Asked:
    """A job and what came of it."""

    def __init__(self, ids: list[int] = IDS, most: int = 6, **settings: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        sampling = Sampling(settings.pop("temperature", 0.0), 1.0, settings.pop("seed", 0))
        self.job = Job(ids, sampling, most, self.events.put, **{"logprobs": 0, **settings})

    def wait(self) -> list[Event]:
        """Return all of its events."""
        found = [self.events.get(timeout=20)]
        while not isinstance(found[-1], Finished | Failed):
            found.append(self.events.get(timeout=20))
        return found

    def tokens(self) -> list[int]:
        """Return the tokens that were written."""
        return [event.scored.token for event in self.wait() if isinstance(event, Decoded) and event.scored]


def make(model: Any, **limits: int) -> Engine:
    model.generation_config.eos_token_id = 95
    given = EngineLimits(**{"slots": 3, "queue": 2, "context": 64, "chunk": 4, **limits})
    return Engine(model, load_tokenizer(sapling()), given, Metrics())


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make(build(families()["llama"].config))
    yield made
    made.close()


class Held:
    """Keeps a model from its next forward until it is let go."""

    def __init__(self, model: Any) -> None:
        self.steps: queue.Queue[None] = queue.Queue()
        self.handle = model.register_forward_pre_hook(lambda *_: self.steps.get(timeout=20))

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.put(None)

    def free(self) -> None:
        self.handle.remove()
        self.let(3)


def test_events_of_a_job_come_in_order(engine: Engine) -> None:
    engine.start()
    asked = Asked(most=3)
    engine.submit(asked.job)
    kinds = [type(event) for event in asked.wait()]
    assert kinds == [Started, Prefilled, Decoded, Decoded, Decoded, Finished]
    until(lambda: engine.idle)
    assert asked.events.empty()


def test_scores_are_those_of_a_plain_forward(engine: Engine) -> None:
    engine.start()
    asked = Asked(list(range(1, 12)), most=4, logprobs=3, score_prompt=True)  # in pieces of 4
    engine.submit(asked.job)
    events = asked.wait()
    scored = [one for event in events if isinstance(event, Prefilled) for one in event.scored]
    scored += [event.scored for event in events if isinstance(event, Decoded) and event.scored]
    tokens = [one.token for one in scored]
    assert tokens[:11] == list(range(1, 12)) and scored[0].logprob is None and scored[0].top == ()
    with torch.no_grad():
        wanted_TV = engine.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    for place, one in enumerate(scored[1:]):
        assert one.logprob == pytest.approx(float(wanted_TV[place, one.token]), abs=1e-4)
        best = wanted_TV[place].topk(3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scores_of_a_prompt_keep_to_the_budget_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(build(families()["llama"].config), chunk=32)
    sizes: list[int] = []
    engine.model.lm_head.register_forward_hook(lambda _module, _args, out: sizes.append(out.shape[1]))
    engine.start()
    found = []
    for limit, largest in ((2**28, 11), (3 * 4 * 96, 3), (4 * 96, 2)):  # one token alone would be a step of an answer
        monkeypatch.setattr("niwaki.model.logits.LOGIT_BYTES", limit)
        asked = Asked(list(range(1, 12)), most=1, logprobs=3, score_prompt=True)
        engine.submit(asked.job)
        found.append([one.logprob for event in asked.wait() if isinstance(event, Prefilled) for one in event.scored])
        assert max(sizes) == largest
        sizes.clear()
    engine.close()
    assert len(found[0]) == 11
    for scores in found[1:]:
        assert scores[1:] == pytest.approx(found[0][1:], abs=1e-5)


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(engine: Engine) -> None:
    engine.start()
    settings = {"most": 12, "temperature": 1.0, "seed": 7}
    alone = Asked(**settings)
    engine.submit(alone.job)
    wanted = alone.tokens()
    others = [Asked([3, 4], most=20, temperature=1.0, seed=1), Asked(**settings), Asked([8] * 9, most=5)]
    for asked in others:
        engine.submit(asked.job)
        assert isinstance(asked.events.get(timeout=20), Started)
    assert others[1].tokens() == wanted
    different = Asked(**{**settings, "seed": 8})
    engine.submit(different.job)
    assert different.tokens() != wanted


def test_the_end_token_and_a_stop_string_end_an_answer(engine: Engine) -> None:
    engine.start()
    plain = Asked(most=8)
    engine.submit(plain.job)
    events = plain.wait()
    tokens = [event.scored.token for event in events if isinstance(event, Decoded) and event.scored]
    text = "".join(event.text for event in events if isinstance(event, Decoded))
    assert events[-1] == Finished("length", 8)
    stop = text[3:5]
    stopped = Asked(most=8, stops=[stop])
    engine.submit(stopped.job)
    events = stopped.wait()
    assert "".join(event.text for event in events if isinstance(event, Decoded)) == text[: text.index(stop)]
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop"
    engine.decoding.end_tokens = frozenset({tokens[4]})
    ended = Asked(most=8)
    engine.submit(ended.job)
    assert ended.wait()[-1] == Finished("stop", tokens.index(tokens[4]))


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine) -> None:
    held = Held(engine.model)
    engine.start()
    asked = [Asked() for _ in range(2 + 1)]
    for one in asked:
        engine.submit(one.job)
        until(lambda: engine.running == 1)  # the first is being read, the others wait
    with pytest.raises(RefusalError) as refused:
        engine.submit(Asked().job)
    assert refused.value.status == 429 and 1 <= (refused.value.retry_s or 0) <= 60
    assert engine.queued == 2
    held.free()
    assert len({tuple(one.tokens()) for one in asked}) == 1


def test_a_cancelled_job_frees_its_slot_and_leaves_the_others_alone(engine: Engine) -> None:
    engine.start()
    reference = Asked(most=20)
    engine.submit(reference.job)
    wanted = reference.tokens()
    held = Held(engine.model)
    kept, gone, queued = Asked(most=20), Asked([2, 3], most=40), Asked()
    for one in (kept, gone):
        engine.submit(one.job)
    held.let(2 + 1 + 4)
    until(lambda: engine.running == 2 and gone.events.qsize() > 3)
    engine.limits = EngineLimits(slots=2, queue=2, context=64)
    engine.submit(queued.job)
    engine.cancel(queued.job)
    assert engine.queued == 0
    engine.cancel(gone.job)
    held.let(2)
    until(lambda: engine.running == 1)
    held.free()
    assert kept.tokens() == wanted
    assert not [event for event in list(queued.events.queue) if isinstance(event, Started)]
    until(lambda: engine.idle)


def test_a_job_cancelled_while_its_prompt_is_read_takes_no_slot(engine: Engine) -> None:
    held = Held(engine.model)
    engine.start()
    asked = Asked(list(range(1, 21)))
    engine.submit(asked.job)
    held.let(1)
    until(lambda: engine.running == 1)
    engine.cancel(asked.job)
    held.let(2)
    until(lambda: engine.idle)
    assert not [event for event in list(asked.events.queue) if isinstance(event, Prefilled | Decoded)]
    held.free()


def test_a_failure_costs_the_answers_it_met_and_no_others(engine: Engine) -> None:
    engine.start()
    broken = engine.model.register_forward_pre_hook(lambda *_: 1 / 0)
    asked = Asked()
    engine.submit(asked.job)
    assert isinstance(asked.wait()[-1], Failed)
    broken.remove()
    healthy = Asked()
    engine.submit(healthy.job)
    assert len(healthy.tokens()) == 6 and engine.healthy


def test_an_answer_of_no_numbers_is_a_failure(engine: Engine) -> None:
    def spoiled(_module: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        output.logits[0, -1, 3] = float("nan")
        return output

    engine.model.register_forward_hook(spoiled, with_kwargs=True)
    engine.start()
    asked = Asked()
    engine.submit(asked.job)
    assert asked.wait()[-1] == Failed("the model computed values that are not numbers")
    until(lambda: engine.idle)


def test_after_failures_in_a_row_the_engine_stops_and_says_so(engine: Engine) -> None:
    engine.model.register_forward_pre_hook(lambda *_: 1 / 0)
    engine.start()
    for _ in range(MAX_FAILURES):
        asked = Asked()
        engine.submit(asked.job)
        assert isinstance(asked.wait()[-1], Failed)
    until(lambda: not engine.healthy)
    with pytest.raises(RefusalError) as refused:
        engine.submit(Asked().job)
    assert refused.value.status == 503


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_kills_the_thread_leaves_nobody_waiting(engine: Engine) -> None:
    """End the loop itself, not by an error of the model."""
    held = Held(engine.model)
    engine.start()
    running, waiting = Asked(), Asked()
    engine.submit(running.job)
    until(lambda: engine.running == 1)
    engine.submit(waiting.job)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    engine.model.register_forward_pre_hook(killed)
    held.free()
    assert isinstance(running.wait()[-1], Failed) and isinstance(waiting.wait()[-1], Failed)
    until(lambda: not engine.healthy)
    with pytest.raises(RefusalError) as refused:
        engine.submit(Asked().job)
    assert refused.value.status == 503


def test_a_step_that_hangs_leaves_nobody_waiting_at_the_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.serve.engine.CLOSE_S", 0.1)
    held = Held(engine.model)
    engine.start()
    asked = Asked()
    engine.submit(asked.job)
    until(lambda: engine.running == 1)
    engine.close()
    assert isinstance(asked.wait()[-1], Failed) and not engine.healthy
    held.free()


def test_draining_answers_what_is_there_and_takes_nothing_new(engine: Engine) -> None:
    held = Held(engine.model)
    engine.start()
    running, waiting = Asked(), Asked()
    engine.submit(running.job)
    engine.submit(waiting.job)
    engine.drain()
    with pytest.raises(RefusalError) as refused:
        engine.submit(Asked().job)
    assert refused.value.status == 503
    held.free()
    assert len(running.tokens()) == len(waiting.tokens()) == 6


def test_closing_fails_what_is_unfinished(engine: Engine) -> None:
    held = Held(engine.model)
    engine.start()
    asked = [Asked(), Asked()]
    for one in asked:
        engine.submit(one.job)
    held.let(1)
    engine._closing = True
    held.free()
    assert all(isinstance(one.wait()[-1], Failed) for one in asked)


def test_a_contextual_model_is_counted_by_what_it_did() -> None:
    model = model_of("llama")
    model.contextual = attach(model, shadow_of(model))
    engine = make(model)
    engine.start()
    asked = [Asked(list(range(1, 1 + PROMPT)), most=5), Asked([1, 2], most=3)]
    for one in asked:
        engine.submit(one.job)
    assert [len(one.tokens()) for one in asked] == [5, 3]
    until(lambda: engine.idle)
    engine.close()
    rows = engine.metrics.text().decode().splitlines()
    assert 'niwaki_gate_decisions_total{decision="sparse"} 1.0' in rows
    assert 'niwaki_gate_decisions_total{decision="unread"} 1.0' in rows
    assert 'niwaki_contextual_tokens_total{weights="part"} 4.0' in rows, "the first token is the prompt's"
    assert "niwaki_written_tokens_total 8.0" in rows and "niwaki_skipped_frac_count 2.0" in rows
    assert f"niwaki_prompt_tokens_total {PROMPT + 2}.0" in rows


def test_files_beside_the_model_say_where_answers_end(tmp_path: Path) -> None:
    model = build(families()["llama"].config)
    tokenizer = load_tokenizer(sapling())
    model.generation_config.eos_token_id = [3, 4]
    assert Engine(model, tokenizer, EngineLimits(1, 1, 8), Metrics()).decoding.end_tokens == {3, 4}
    model.generation_config.eos_token_id = None
    assert Engine(model, tokenizer, EngineLimits(1, 1, 8), Metrics()).decoding.end_tokens == {tokenizer.eos_token_id}
