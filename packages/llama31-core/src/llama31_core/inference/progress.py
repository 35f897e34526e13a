"""From computed logits to the tokens of a request: the row of a pass in, what it adds to each completion out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from llama31_core.errors import SamplingError
from llama31_core.inference.beam_search import BeamSearch
from llama31_core.inference.request import FinishReason, PromptLogprobs, Request, StepOutput
from llama31_core.inference.rows import Row
from llama31_core.inference.sampling import Sampler, check_best, log_softmax
from llama31_core.inference.scheduler import Scheduler
from llama31_core.inference.sequence import Sequence

Logits = npt.NDArray[np.float32]


@dataclass(eq=False)
class Group:
    """A request, those of its sequences that go on, and which of its completions have not ended."""

    request: Request
    sequences: list[Sequence]
    search: BeamSearch | None = None
    open_indexes: set[int] = field(init=False)
    prompt_logprobs: PromptLogprobs | None = None  # until they have been reported

    def __post_init__(self) -> None:
        self.open_indexes = set(range(self.request.params.n))

    @classmethod
    def start(cls, request: Request) -> Group:
        """One sequence, which forks when the prompt has been computed."""
        params = request.params
        first = build_sequence(request, 0)
        if params.num_beams == 1:
            first.width = params.n
            return cls(request, [first])
        first.width, first.in_lockstep = params.num_beams, True
        search = BeamSearch(
            params.num_beams, request.stop_ids, request.max_tokens, params.length_penalty, params.early_stopping
        )
        return cls(request, [first], search)


def build_sequence(request: Request, index: int) -> Sequence:
    """An empty completion of a request."""
    return Sequence(request, index, Sampler(request.params, request.stop_ids, index))


class Progress:
    """Draws tokens, forks sequences and ends them.

    Args:
        scheduler: which runs them.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.num_drafted = 0
        self.num_accepted = 0

    def advance(
        self, group: Group, row: Row, logits_TV: Logits, likeliest_T: npt.NDArray[np.int64]
    ) -> list[StepOutput]:
        """Take the logits that a row asked for, and the index of the largest of each.

        Raises:
            SamplingError: they are not numbers, or every token is banned.
        """
        sequence, completes = row.sequence, row.completes
        if sequence.wants_prompt_logprobs:
            sequence.note_prompt(sequence.num_cached, logits_TV)
            group.prompt_logprobs = sequence.prompt_logprobs
        self._scheduler.cache.computed(sequence, row.num_tokens)
        if not completes:
            return []
        last = slice(len(logits_TV) - 1 - len(row.drafts), None)
        logits_TV, likeliest_T = logits_TV[last], likeliest_T[last]
        if group.search is not None:
            outputs = self._advance_beams(group, group.search, sequence, logits_TV[0])
        else:
            outputs = []
            for branch in self._branches(group, sequence):
                outputs.append(self._draw(branch, row.drafts, logits_TV, likeliest_T))
                if outputs[-1].finish_reason is not None:
                    self.end(group, branch)
        if outputs and group.prompt_logprobs is not None:
            outputs[0] = replace(outputs[0], prompt_logprobs=group.prompt_logprobs)
            group.prompt_logprobs = None
        return outputs

    def end(self, group: Group, sequence: Sequence, *, failed: bool = False) -> None:
        """Take a sequence out of its group and everything it has."""
        group.sequences.remove(sequence)
        self._scheduler.finish(sequence, failed=failed)

    def _branches(self, group: Group, sequence: Sequence) -> list[Sequence]:
        """The sequence itself; when its prompt has just been computed, the others of its request as well."""
        branches = [sequence]
        for index in range(1, sequence.width):
            branches.append(build_sequence(sequence.request, index))
            group.sequences.append(branches[-1])
            self._scheduler.add_branch(sequence, branches[-1])
        sequence.width = 1
        return branches

    def _draw(
        self, sequence: Sequence, drafts: list[int], logits_TV: Logits, likeliest_T: npt.NDArray[np.int64]
    ) -> StepOutput:
        """Draw a token, and one more for each guess that was right."""
        before = len(sequence.output_ids)
        reason: FinishReason | None = None
        self.num_drafted += len(drafts)
        for logits_V, likeliest, guess in zip(logits_TV, likeliest_T, [*drafts, None], strict=True):
            if sequence.sampler.takes_argmax:
                check_best(float(logits_V[likeliest]))
                token = int(likeliest)
            else:
                token = sequence.draw(logits_V)
            reason = sequence.accept(token, logits_V)
            if reason is not None or token != guess:
                break
            self._scheduler.cache.computed(sequence, 1)
            self.num_accepted += 1
        logprobs = None if sequence.request.params.logprobs is None else sequence.output_logprobs[before:]
        request_id, index = sequence.request.request_id, sequence.index
        return StepOutput(request_id, sequence.output_ids[before:], reason, logprobs, index)

    def _advance_beams(
        self, group: Group, search: BeamSearch, sequence: Sequence, logits_V: Logits
    ) -> list[StepOutput]:
        """Keep what a beam has computed; when all have, choose the next ones, or report the best."""
        check_best(float(logits_V.max()))
        log_probs_V = log_softmax(logits_V)
        prompt_ids = sequence.request.prompt_ids
        sequence.beam_scores = np.asarray(sequence.sampler.adjust(log_probs_V, prompt_ids, sequence.output_ids))
        if any(beam.num_uncached for beam in group.sequences):
            return []
        chosen = search.advance(
            np.stack([beam.beam_scores for beam in group.sequences if beam.beam_scores is not None])
        )
        if not search.is_done:
            self._reassign(group, chosen)
            return []
        best = search.ended[: group.request.params.n]
        if len(best) < group.request.params.n:
            raise SamplingError(f"only {len(best)} beams could end, n is {group.request.params.n}; ban fewer tokens")
        for beam in tuple(group.sequences):
            self.end(group, beam)
        return [
            StepOutput(
                group.request.request_id,
                beam.token_ids,
                "stop" if beam.stopped else "length",
                index=index,
                score=beam.score,
            )
            for index, beam in enumerate(best)
        ]

    def _reassign(self, group: Group, chosen: list[tuple[int, int]]) -> None:
        """Replace the beams by the chosen continuations: new sequences over the blocks of the old ones."""
        old = group.sequences
        group.sequences = []
        for index, (parent, token) in enumerate(chosen):
            beam = build_sequence(group.request, index)
            beam.in_lockstep = True
            beam.output_ids = list(old[parent].output_ids)
            self._scheduler.add_branch(old[parent], beam)
            beam.output_ids.append(token)
            group.sequences.append(beam)
        for beam in old:
            self._scheduler.finish(beam)
