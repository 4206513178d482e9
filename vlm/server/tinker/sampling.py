"""Sampling requests of the Tinker protocol: sampling sessions, samples, and log-probabilities of prompts.

The answer to a sample is fetched later, by request id. Everything here runs on the event loop.
"""

import asyncio
import math
import uuid
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace

import numpy as np
from tinker import types

from kshot.errors import BusyError, RequestError
from vlm.local.clients import SamplingRequest, refuse
from vlm.server.futures import PROTOBUF, Answer, error_answer
from vlm.server.limits.memory import QUEUES, Reservation
from vlm.server.owners import Owner
from vlm.server.state import ServerState, check_number, sampler_id
from vlm.server.tables import Sampler
from vlm.server.tinker import wire

WAITING = 4096  # sampling requests that may wait
SAMPLES = 1024  # sequences of one request
TOP = 1 << 20  # positions x likeliest tokens of one request, of its prompt and of all its samples
SAMPLED = 1 << 15  # tokens of a sample where the request says nothing and no model is loaded yet
ENTRY = 160  # bytes of a token and its log-probability: two objects of Python, lists of them, arrays, and the answer
LAST_SAMPLE = 2**63 - 1  # number of a request in its sampling session: the SDK counts from a billion per client on


@dataclass(frozen=True)
class SamplingService:
    """Takes sampling requests. image_log_probs: what stands at image positions among a prompt's log-probabilities: NaN,
    as nothing is scored there, or a number for clients that multiply all of them with weights."""

    state: ServerState
    image_log_probs: float = math.nan

    def create_sampling_session(self, request: types.CreateSamplingSessionRequest, owner: Owner) -> str:
        """The id of a sampling session, the same for the same number. Raises where its weights are not here."""
        check_number("sampling_session_seq_id", request.sampling_session_seq_id)
        self.state.check_session(request.session_id, owner)
        saved = self.state.samplers.check(request.model_path, request.base_model, owner)
        base = saved.base_model if saved else request.base_model
        if request.base_model not in (None, base):
            raise RequestError(f"{request.model_path} is of {base!r}, not of {request.base_model!r}")
        name = sampler_id(request.session_id, request.sampling_session_seq_id)
        before = self.state.store.get(Sampler, name)
        if before is None:
            row = Sampler(name, request.session_id, str(base), request.model_path, owner=owner.name)
            self.state.retention.add(row)
        elif before.ephemeral or (before.base_model, before.model_path) != (base, request.model_path):
            raise RequestError(f"sampling session {name} is of other weights; take the next sampling_session_seq_id")
        return name

    def sample(self, request: types.SampleRequest, parsed: Reservation, owner: Owner) -> tuple[str, list[str]]:
        """The id of a request, and of each of its samples. parsed: what the request takes; what its answer takes is
        added. Raises RequestError, MissingError, BusyError."""
        refuse(record_stability_info=request.record_stability_info)
        entries = _entries(request, self._longest())
        key = self._key(request, owner)
        request_id = self.state.futures.id_of(key, owner)
        if request_id is None:
            check_room(self.state)
            targets = request.target_prompt_logprobs
            tensor = None if targets is None else wire.tensor_from_json(targets, "target_prompt_logprobs")
            parsed.become(QUEUES, parsed.size + ENTRY * entries)
            request_id = self.state.futures.open(key, owner, parsed)
            self.state.samplings[request_id] = Future()  # until its weights are there; may be cancelled
            self.state.background(self._work(request_id, request, tensor, owner))
        return request_id, [f"{request_id}:{number}" for number in range(request.num_samples)]

    def cancel(self, request_id: str) -> None:
        """Stop sampling that nobody waits for any more."""
        if (future := self.state.samplings.get(request_id)) is not None:
            future.cancel()

    def _longest(self) -> int:
        """The most tokens of a sample: the longest context of the models."""
        return max((engine.model.context for engine in self.state.registry.engines.values()), default=SAMPLED)

    def _key(self, request: types.SampleRequest, owner: Owner) -> str:
        """The request's key, once its weights were looked up."""
        if (name := request.sampling_session_id) is not None:
            if request.seq_id is None:
                raise RequestError("a request of a sampling session needs its number, seq_id")
            check_number("seq_id", request.seq_id, 0, LAST_SAMPLE)
            self.state.samplers.row(name, owner)
            return f"{name}/{request.seq_id}"
        if request.model_path is None and request.base_model is None:
            raise RequestError("asample names no weights; give sampling_session_id, model_path or base_model")
        self.state.samplers.check(request.model_path, request.base_model, owner)
        return uuid.uuid4().hex

    async def _work(
        self, request_id: str, request: types.SampleRequest, targets: types.TensorData | None, owner: Owner
    ) -> None:
        samplers, samplings = self.state.samplers, self.state.samplings
        try:
            if request.sampling_session_id is not None:
                client = await samplers.client_of(request.sampling_session_id, owner)
            else:
                client = await samplers.client(request.model_path, request.base_model, owner)
            if not samplings[request_id].cancelled():
                samplings[request_id] = client.start(_sampling_request(request, targets))
            response = await asyncio.wrap_future(samplings[request_id])
            values = response.prompt_logprobs_np
            if not (values is None or request.prompt_logprobs_last_n is not None or math.isnan(self.image_log_probs)):
                values = np.concatenate([values[:1], np.nan_to_num(values[1:], nan=self.image_log_probs)])
                response = replace(response, prompt_logprobs_np=values)
            answer = Answer(wire.sample_response(response, targets), PROTOBUF)
        except asyncio.CancelledError:
            answer = error_answer(CancelledError())
        except Exception as error:
            answer = error_answer(error)
        del samplings[request_id]
        self.state.futures.finish(request_id, answer)


def check_room(state: ServerState) -> None:
    """Raise BusyError where too many sampling requests wait."""
    waiting = sum(each.waiting_samples for each in state.registry.schedulers.values())
    if max(len(state.samplings), waiting) >= WAITING:
        raise BusyError(f"{WAITING} sampling requests are waiting; send this one again later")


def _sampling_request(request: types.SampleRequest, targets: types.TensorData | None) -> SamplingRequest:
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


def _entries(request: types.SampleRequest, longest: int) -> int:
    """How many tokens with log-probabilities an answer may hold beside the sampled ones, which are few beside the
    model's own memory of them. Raises RequestError for more than TOP of a kind, and for fewer than none."""
    check_number("num_samples", request.num_samples, 1, SAMPLES)
    shape = request.target_prompt_logprobs.shape if request.target_prompt_logprobs else None
    tokens = request.num_samples * min(request.sampling_params.max_tokens or longest, longest)
    length = sum(_length(chunk) for chunk in request.prompt.chunks)
    kinds = {
        "topk_prompt_logprobs": length * request.topk_prompt_logprobs,
        "prompt_alt_tokens_k": length * request.prompt_alt_tokens_k,
        "topk_sample_logprobs": tokens * request.topk_sample_logprobs,
        "target_prompt_logprobs": math.prod(shape or [0]),
    }
    for name, number in kinds.items():
        if number < 0 or length < 0:  # which would give memory back that was never taken
            raise RequestError(f"{name}, max_tokens and the lengths of images are counts; give no negative ones")
        if number > TOP:
            what = f"{name}: more than {TOP:,} log-probabilities are asked for (positions x tokens)"
            raise RequestError(f"{what}, {number:,}; ask for fewer, or set max_tokens")
    return length + sum(kinds.values())


def _length(chunk: types.ModelInputChunk) -> int:
    """Positions of a chunk, as far as they are known before images are decoded: the engine counts those."""
    return (chunk.expected_tokens or 1) if isinstance(chunk, types.ImageChunk) else chunk.length
