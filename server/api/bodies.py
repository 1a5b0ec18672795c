"""The JSON of a response: OpenAI's chat and text completions, whole and in chunks, and the alignment report."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from guiderail.guides.core.types import Candidate, Final, TokenLogprob
from guiderail.guides.scoring import token_entropy
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.requests.build import Request
from guiderail.server.requests.wire import unknown_warnings

Json = dict[str, object]


@dataclass(slots=True)
class ChatBody:
    """The bodies of one chat response."""

    request: Request
    renderer: ChatRenderer
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, final: Final) -> Json:
        """One answer of a whole response."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": final.finish_reason,
            "stop_reason": final.stop_reason,
        }

    def opening(self, index: int) -> Json | None:
        """The choice of the first chunk of an answer."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Json:
        """The choice of a chunk that brings text."""
        return {
            "index": index,
            "delta": {"content": text},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": None,
        }

    def closing(self, index: int, final: Final) -> Json:
        """The choice of an answer's last chunk."""
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": final.finish_reason,
            "stop_reason": final.stop_reason,
        }

    def _logprobs(self, found: Sequence[TokenLogprob] | None) -> Json | None:
        if found is None:
            return None
        count = self.request.contexts[0].sampling.logprobs or 0
        content = []
        for each, (text, own) in zip(found, spelled(found, self.renderer), strict=True):
            top = [
                _entry(self.renderer.token_text(token), logprob, self.renderer.token_bytes(token))
                for token, logprob in each.top[:count]
            ]
            content.append({**_entry(text, each.logprob, own), "top_logprobs": top})
        return {"content": content, "refusal": None}


@dataclass(slots=True)
class TextBody:
    """The bodies of one text completion response."""

    request: Request
    renderer: ChatRenderer
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, final: Final) -> Json:
        """One answer of a whole response."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": final.finish_reason,
            "stop_reason": final.stop_reason,
        }

    def opening(self, index: int) -> Json | None:
        """Text completions have no opening chunk."""
        return None

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Json:
        """The choice of a chunk that brings text."""
        return {"index": index, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": None}

    def closing(self, index: int, final: Final) -> Json:
        """The choice of an answer's last chunk."""
        return self.choice(index, "", None, final)

    def _logprobs(self, found: Sequence[TokenLogprob] | None) -> Json | None:
        if found is None:
            return None
        count = self.request.contexts[0].sampling.logprobs or 0
        return {
            "tokens": [text for text, _ in spelled(found, self.renderer)],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [
                {self.renderer.token_text(token): logprob for token, logprob in each.top[:count]} for each in found
            ],
            "text_offset": [each.offset for each in found],
        }


Body = ChatBody | TextBody


def spelled(found: Sequence[TokenLogprob], renderer: ChatRenderer) -> list[tuple[str, bytes | None]]:
    """Return text and bytes of delivered tokens. The bytes together are the delivered text's; None where they are not.

    A space that the decoder drops at a text's start is not of the token either.
    """
    result: list[tuple[str, bytes | None]] = []
    for (_, part), group in groupby(found, key=lambda each: (each.offset, each.part)):
        ids = [each.token_id for each in group]
        known = [renderer.token_bytes(token) for token in ids]
        pieces = [each for each in known if each is not None]
        whole, wanted = b"".join(pieces), None if part is None else part.encode()
        if len(pieces) == len(ids) and wanted is not None and whole == b" " + wanted and pieces[0][:1] == b" ":
            pieces[0], whole = pieces[0][1:], wanted
        if len(pieces) == len(ids) and wanted in (None, whole):
            result += [(each.decode(errors="replace"), each) for each in pieces]
        else:
            result += [(renderer.token_text(token), None) for token in ids]
    return result


def _entry(token: str, logprob: float, own: bytes | None) -> Json:
    return {"token": token, "logprob": logprob, "bytes": None if own is None else list(own)}


def envelope(body: Body, kind: str, choices: list[Json]) -> Json:
    """Return what every body and chunk has around its choices."""
    return {
        "id": body.id,
        "object": kind,
        "created": body.created,
        "model": body.request.model,
        "system_fingerprint": body.request.system_fingerprint,
        "choices": choices,
    }


def token_ids(body: Body, index: int, ids: Sequence[int], *, first: bool) -> Json:
    """Return what `return_token_ids` adds to a choice: new tokens, and to the first of a text completion its prompt."""
    if not body.request.return_token_ids:
        return {}
    prompt = prompt_ids(body, index) if first and isinstance(body, TextBody) else {}
    return {"token_ids": list(ids), **prompt}


def prompt_ids(body: Body, index: int = 0) -> Json:
    """Return the prompt's tokens, which `return_token_ids` adds to a chat's whole body or first chunk."""
    if not body.request.return_token_ids:
        return {}
    return {"prompt_token_ids": list(body.request.contexts[index].dialogue.prompt.token_ids)}


def usage(request: Request, completion: int | None = None) -> dict[str, int]:
    """OpenAI's usage: the prompt once and the answers returned. What was discarded is in the spend.

    completion: tokens of the answers so far, while they are streamed.
    """
    prompt = request.spend.prompt_tokens
    completion = request.spend.tokens_accepted if completion is None else completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def alignment_report(request: Request, finals: Sequence[Final]) -> Json:
    """The response's `alignment`: resolved configuration, scores and spend."""
    told = (warning for ctx in request.contexts for warning in ctx.report.warnings)
    return {
        "config": request.alignment.echo(),
        "choices": [_choice_report(i, final, request) for i, final in enumerate(finals)],
        "warnings": list(dict.fromkeys([*unknown_warnings(request.ignored), *told])),
        "spend": request.spend.report(),
    }


def _choice_report(index: int, final: Final, request: Request) -> Json:
    chosen = final.candidates[final.chosen]
    selection = request.contexts[index].report
    report: Json = {
        "index": index,
        "chosen": final.chosen,
        "stopped_by": final.stopped_by,
        "score": chosen.combined,
        "rewards": chosen.rewards,
        "transformed": chosen.transformed,
        "calibration": selection.calibration,
        "diagnostics": {
            "kl": None if selection.kl is None else round(selection.kl, 6),
            "selections": selection.picks,
            "effective_sample_size": selection.effective_sample_size,
            **token_entropy(chosen.logprobs),
            **selection.detail,
            "warnings": selection.warnings,
        },
    }
    if request.alignment.return_candidates:
        clean = request.contexts[index].dialogue.clean
        report["candidates"] = [
            {**_candidate_report(candidate), "text": clean(candidate.text)} for candidate in final.candidates
        ]
    return report


def _candidate_report(candidate: Candidate) -> Json:
    return {
        "index": candidate.index,
        "tokens": len(candidate.token_ids),
        "finish_reason": candidate.finish_reason,
        "score": candidate.combined,
        "rewards": candidate.rewards,
        "transformed": candidate.transformed,
        "adjusted_score": candidate.adjusted,
        "weight": candidate.weight,
    }
