"""From a hint's HTTP body to what the schedulers understand, and back to a receipt."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.config import SymphonyConfig
from symphony_sglang.core import hints
from symphony_sglang.core.budget import Admission, CallerBudget, CallerLimits, Refusal
from symphony_sglang.core.lifecycle import FINAL_STATES
from symphony_sglang.core.prefix import pack_tokens
from symphony_sglang.engine.gateway import Gateway
from symphony_sglang.engine.messages import AdvisoryAction, AdvisoryBatch
from symphony_sglang.engine.metrics import http_metrics
from symphony_sglang.engine.schedulers import ask_schedulers
from symphony_sglang.errors import HintError, UnsupportedError

logger = logging.getLogger(__name__)

# Advisories of a caller over its tokens that are looked up before it is refused, and how often.
REFRESH_MAX = 64
REFRESH_SECONDS = 0.1


class AdviseService:
    """The HTTP process's side of advisories, one a process."""

    def __init__(
        self,
        manager: Any,
        app: Any,
        *,
        clock: Clock | None = None,
        config: SymphonyConfig | None = None,
    ) -> None:
        self._manager = manager
        self._app = app
        self._clock = clock or SystemClock()
        self._gateway = Gateway(self._ask)
        self.metrics = http_metrics(manager)
        self.config = config or SymphonyConfig.from_environment()
        rate = self.config.advise_rate
        limits = CallerLimits(
            rate_per_second=rate,
            burst=max(1.0, 2 * rate),
            tokens_in_flight_max=self.config.advise_tokens,
        )
        self._budget = CallerBudget(limits)
        # When a caller's advisories were looked up; at most as many as the budget has callers.
        self._refreshed: dict[str, float] = {}

    async def _ask(self, actions: list[AdvisoryAction]) -> list[dict[str, Any]]:
        batch = AdvisoryBatch(actions=actions, sent_seconds=self._clock.monotonic())
        replies = await ask_schedulers(self._manager, batch)
        if "error" in replies[0].body:
            raise UnsupportedError(replies[0].body["error"])
        # Data-parallel ranks keep sessions of their own: the one that knows this one answers.
        return [
            merge_answers(answers)
            for answers in zip(*(r.body["answers"] for r in replies), strict=True)
        ]

    async def submit(self, action: AdvisoryAction) -> dict[str, Any]:
        """The answer of the schedulers, ``{}`` for what they do not know."""
        answer: dict[str, Any] = await self._gateway.submit(action)
        return answer

    async def admit(self, caller: str, count: int) -> Admission:
        """Charge `count` hints to `caller`, or say which of its limits stands in the way."""
        admission = self._budget.admit(caller, self._clock.monotonic(), count=count)
        if admission.refusal is Refusal.TOKENS and await self._refresh(caller):
            admission = self._budget.admit(caller, self._clock.monotonic(), count=count)
        if admission.refusal is not None and self.metrics is not None:
            self.metrics.refused(admission.refusal.value, count)
        return admission

    async def _refresh(self, caller: str) -> bool:
        """Ask which of the caller's oldest advisories have ended; whether there was an answer.

        Advisories end in the schedulers, which tell nobody: it only matters to a caller that is
        about to be refused.
        """
        now_seconds = self._clock.monotonic()
        if now_seconds - self._refreshed.get(caller, -REFRESH_SECONDS) < REFRESH_SECONDS:
            return False
        if len(self._refreshed) >= self._budget.limits.callers_max:
            self._refreshed.clear()
        self._refreshed[caller] = now_seconds
        live = self._budget.live(caller, REFRESH_MAX)
        answers = await asyncio.gather(
            *(self.submit(AdvisoryAction(verb="receipt", advisory_id=key)) for key in live)
        )
        for advisory_id, answer in zip(live, answers, strict=True):
            if not answer or answer["state"] in FINAL_STATES:
                self._budget.ended(caller, advisory_id)
        return True

    async def advise(self, message: hints.HintMessage, caller: str) -> dict[str, Any]:
        """Carry out a parsed message that was admitted; the body of the 202.

        Raises:
            HintError: messages that the chat template refuses.
        """
        actions = [await self.action(hint, caller) for hint in message.hints]
        answers = await asyncio.gather(*(self.submit(action) for action in actions))
        receipts = [
            answer or not_found(action) for action, answer in zip(actions, answers, strict=True)
        ]
        for action, receipt in zip(actions, receipts, strict=True):
            self.charge(action, receipt)
        return {"message_id": message.message_id or f"msg-{uuid.uuid4().hex}", "receipts": receipts}

    async def advise_quietly(self, message: hints.HintMessage, caller: str) -> None:
        """Carry out hints that nobody waits for; those beyond the caller's budget are dropped.

        Raises:
            HintError: messages that the chat template refuses.
        """
        if not message.hints:
            return
        admission = await self.admit(caller, len(message.hints))
        if admission.allowed:
            await self.advise(message, caller)
        else:
            logger.info("kv_hints of a request dropped: %s", admission.refusal)

    def charge(self, action: AdvisoryAction, receipt: dict[str, Any]) -> None:
        """Count what the schedulers took in against the caller, until it ends."""
        advisory_id = receipt.get("advisory_id")
        if not advisory_id:
            return
        if receipt["state"] in FINAL_STATES:
            self._budget.ended(action.caller, advisory_id)
        elif action.verb in ("prefetch", "retain"):
            now_seconds = self._clock.monotonic()
            tokens = receipt["tokens"]
            self._budget.started(
                action.caller,
                advisory_id,
                int(tokens.get("goal", tokens.get("total", 0))),
                now_seconds + action.expires_in_seconds,
                now_seconds,
            )

    async def action(self, hint: hints.Hint, caller: str) -> AdvisoryAction:
        """One hint with its prefix tokenized; text and messages leave the event loop for that."""
        common: dict[str, Any] = {"action_id": hint.action_id, "caller": caller}
        # A router implies hints too, and does not know what this worker was told.
        implicit = (hint.action_id or "").startswith(hints.IMPLICIT_PREFIX)
        if implicit and not self.config.implicit_hints:
            return self.unsupported("implicit_hints_off", common)
        match hint.action:
            case hints.Prefetch() as prefetch:
                return AdvisoryAction(
                    verb="prefetch",
                    advisory_id=new_advisory_id(),
                    target=prefetch.target.value,
                    expected_in_seconds=prefetch.expected_in_seconds,
                    expires_in_seconds=prefetch.expires_in_seconds,
                    priority=prefetch.priority,
                    **await self.prefix(prefetch.selector),
                    **common,
                )
            case hints.Retain() as retain:
                return AdvisoryAction(
                    verb="retain",
                    advisory_id=new_advisory_id(),
                    target=retain.target.value,
                    expires_in_seconds=retain.expires_in_seconds,
                    priority=retain.priority,
                    **await self.prefix(retain.selector),
                    **common,
                )
            case hints.Cancel(advisory_id=str() as advisory_id):
                return AdvisoryAction(verb="cancel", advisory_id=advisory_id, **common)
            case hints.Cancel(selector=hints.Selector(session_id=str() as session_id)):
                return AdvisoryAction(verb="cancel", session_id=session_id, **common)
            case hints.Release(selector=hints.Selector(session_id=str() as session_id)):
                return AdvisoryAction(
                    verb="release",
                    advisory_id=new_advisory_id(),
                    session_id=session_id,
                    **common,
                )
            case hints.Demote(selector=selector):
                return AdvisoryAction(
                    verb="demote",
                    advisory_id=new_advisory_id(),
                    **await self.prefix(selector),
                    **common,
                )
            case hints.Unsupported() as unknown:
                reason = unknown.reason
            case hints.Share():
                reason = "share_needs_the_router"
            case _:
                reason = "not_yet_supported"
        return self.unsupported(reason, common)

    @staticmethod
    def unsupported(reason: str, common: dict[str, Any]) -> AdvisoryAction:
        return AdvisoryAction(
            verb="unsupported", advisory_id=new_advisory_id(), reason=reason, **common
        )

    async def prefix(self, selector: hints.Selector) -> dict[str, Any]:
        """The fields of an action that say which prefix is meant."""
        fields: dict[str, Any] = {
            "extra_key": selector.namespace.extra_key,
            "cache_salt": selector.namespace.cache_salt,
        }
        if selector.session_id is not None:
            return {**fields, "session_id": selector.session_id}
        if selector.input_ids is not None:
            ids: Any = selector.input_ids
            limit = self._manager.model_config.vocab_size
            if max(ids) >= limit:
                raise HintError("input_ids", f"{max(ids)}; expected ids below {limit}")
        elif selector.text is not None:
            ids = await asyncio.to_thread(self._manager.tokenizer.encode, selector.text)
        else:
            ids = await asyncio.to_thread(self._chat_ids, list(selector.messages or ()))
        return {**fields, "token_bytes": pack_tokens(ids)}

    def _chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Messages as the chat route tokenizes them, up to where the next one would start."""
        from sglang.srt.entrypoints.openai.protocol import TokenizeRequest

        tokenize = self._app.state.openai_serving_tokenize
        try:
            request = TokenizeRequest(messages=messages, add_generation_prompt=False)
            ids: list[int] = tokenize._tokenize_chat_request(request)
        except ValueError as error:
            raise HintError("messages", f"the chat template refuses them: {error}") from error
        return ids


def new_advisory_id() -> str:
    return f"adv-{uuid.uuid4().hex}"


def merge_answers(answers: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One answer of several data-parallel ranks: the first that is not ``missing`` or empty."""
    for answer in answers:
        if answer and answer.get("status") != "missing":
            return answer
    return answers[0]


def not_found(action: AdvisoryAction) -> dict[str, Any]:
    """The receipt of a cancel that named nothing known."""
    return {
        "advisory_id": action.advisory_id or None,
        "action_id": action.action_id,
        "status": "missing",
        "reason": "unknown_advisory" if action.advisory_id else "no_live_advisory",
        "session_id": action.session_id,
        "worker": "",
        "state": "failed",
        "tokens": {},
        "bytes": {},
        "timeline": [],
    }
