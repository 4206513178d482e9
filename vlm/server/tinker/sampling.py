"""Requests of sampling: sampling sessions, samples, log-probabilities of prompts. Answers come later, by request id.

Runs on the event loop. Knows no HTTP and no mathematics.
"""

import math
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tinker import types

from kshot.errors import BusyError, RequestError
from vlm.local.clients import SamplingRequest, SamplingTask, refuse
from vlm.server.futures import PROTOBUF, Answer
from vlm.server.runs import answered, when_done
from vlm.server.state import ServerState, check_number
from vlm.server.tinker import wire
from vlm.server.tinker import wire as tensors

WAITING = 4096  # sampling requests that may wait
SAMPLES = 1024  # sequences of one request
TOP = 1 << 20  # positions x likeliest tokens of one request


@dataclass(frozen=True)
class SamplingService:
    """The sampling side of a server.

    image_log_probs: what stands at image positions among a prompt's log-probabilities: NaN, as nothing is scored there,
    or a number for clients that multiply all of them with weights.
    """

    state: ServerState
    image_log_probs: float = math.nan

    def create_sampling_session(self, request: types.CreateSamplingSessionRequest) -> str:
        """The id of a sampling session, the same for the same number. Raises where its weights are not here."""
        check_number("sampling_session_seq_id", request.sampling_session_seq_id)
        self.state.active(request.session_id)
        self.state.samplers.check(request.model_path, request.base_model)
        base = request.base_model
        if request.model_path is not None:
            base = self.state.checkpoints.existing(request.model_path).base_model
            if request.base_model not in (None, base):
                raise RequestError(f"{request.model_path} is of {base!r}, not of {request.base_model!r}")
        name = sampler_id(request.session_id, request.sampling_session_seq_id)
        before = self.state.store.sampler(name)
        if before is None:
            self.state.store.add_sampler(name, request.session_id, str(base), request.model_path)
        elif before.ephemeral or (before.base_model, before.model_path) != (base, request.model_path):
            raise RequestError(f"sampling session {name} is of other weights; take the next sampling_session_seq_id")
        return name

    def sample(self, request: types.SampleRequest) -> tuple[str, list[str]]:
        """Samples after a prompt; the id of the request, and of each sample."""
        refuse(record_stability_info=request.record_stability_info)
        _check_size(request)
        source, key = self._source(request)
        request_id = self.state.futures.known(key)
        if request_id is None:
            if len(self.state.samplings) >= WAITING:
                raise BusyError(f"{WAITING} sampling requests are waiting; send this one again later")
            asked = request.target_prompt_logprobs
            targets = None if asked is None else tensors.of_model(asked, "target_prompt_logprobs")
            request_id = self.state.futures.open(key)
            self.state.samplings[request_id] = SamplingTask(Future())  # until its weights are there; may be cancelled
            self.state.background(self._sample(request_id, request, source, targets))
        return request_id, [f"{request_id}:{number}" for number in range(request.num_samples)]

    def cancel(self, request_id: str) -> None:
        """Stop sampling that nobody waits for any more."""
        if (under_way := self.state.samplings.get(request_id)) is not None:
            under_way.cancel()

    def _source(self, request: types.SampleRequest) -> tuple[Callable[[], Any], str]:
        """Where a request's weights come from, and its key."""
        if (name := request.sampling_session_id) is not None:
            if request.seq_id is None:
                raise RequestError("a request of a sampling session needs its number, seq_id")
            self.state.samplers.check_session(name)
            return lambda: self.state.samplers.of(name), f"{name}/{request.seq_id}"
        if request.model_path is None and request.base_model is None:
            raise RequestError("asample names no weights; give sampling_session_id, model_path or base_model")
        self.state.samplers.check(request.model_path, request.base_model)
        return lambda: self.state.samplers.client(request.model_path, request.base_model), uuid.uuid4().hex

    async def _sample(
        self, request_id: str, request: types.SampleRequest, source: Callable[[], Any], targets: types.TensorData | None
    ) -> None:
        def answer(response: types.SampleResponse) -> Answer:
            return Answer(wire.sample_response(self._with_images(request, response), targets), PROTOBUF)

        def done(result: Any) -> None:
            self.state.samplings.pop(request_id, None)
            self.state.futures.finish(request_id, answered(answer, result))

        try:
            client = await source()
            if self.state.samplings[request_id].future.cancelled():
                return done(CancelledError())
            started = client.start(_ask(request, targets))
        except Exception as error:
            return done(error)
        self.state.samplings[request_id] = started
        return when_done(started.future, done)

    def _with_images(self, request: types.SampleRequest, response: types.SampleResponse) -> types.SampleResponse:
        """The response with the number for image positions: of a whole prompt, those but the first that have none."""
        values = response.prompt_logprobs_np
        if values is None or request.prompt_logprobs_last_n is not None or math.isnan(self.image_log_probs):
            return response
        values = np.concatenate([values[:1], np.nan_to_num(values[1:], nan=self.image_log_probs)])
        return replace(response, prompt_logprobs_np=values)


def _ask(request: types.SampleRequest, targets: types.TensorData | None) -> SamplingRequest:
    return SamplingRequest(
        request.prompt,
        request.sampling_params,
        request.num_samples,
        bool(request.prompt_logprobs),
        request.topk_prompt_logprobs,
        targets,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
    )


def sampler_id(session: str, seq: int) -> str:
    """The id of a sampling session of a session."""
    return f"{session}:sample:{seq}"


def _check_size(request: types.SampleRequest) -> None:
    """Raise RequestError for what would take much memory before anybody looks at it."""
    if not 1 <= request.num_samples <= SAMPLES:
        raise RequestError(f"num_samples = {request.num_samples} is out of range: it must be from 1 to {SAMPLES}")
    shape = request.target_prompt_logprobs.shape if request.target_prompt_logprobs else None
    widest = max(request.topk_prompt_logprobs, request.prompt_alt_tokens_k, request.topk_sample_logprobs)
    length = sum(_length(chunk) for chunk in request.prompt.chunks)
    if max(length * widest, math.prod(shape or [0])) > TOP:
        raise RequestError(f"more than {TOP:,} log-probabilities are asked for (positions x tokens); ask for fewer")


def _length(chunk: types.ModelInputChunk) -> int:
    """Positions of a chunk, as far as they are known before images are decoded: the engine counts those."""
    return (chunk.expected_tokens or 1) if isinstance(chunk, types.ImageChunk) else chunk.length
