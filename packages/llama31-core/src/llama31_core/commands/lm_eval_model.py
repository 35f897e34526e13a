"""An engine as a model of EleutherAI's lm-evaluation-harness 0.4: text in; log-likelihoods and completions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama31_core.errors import ConfigError
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer import ChatFormat, StreamDecoder, Tokenizer

_MAX_NEW_TOKENS = 256


class EngineScorer:
    """What the harness asks of a model, over token ids.

    Args:
        engine: runs the model; nothing else uses it meanwhile.
        adapter: the name of an adapter, if the model has one beside it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, adapter: str | None = None) -> None:
        self._engine, self._tokenizer, self._adapter = engine, tokenizer, adapter
        self.max_length = engine.max_seq_len - 1  # the engine generates a token in any case

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability of the continuation, and whether it is the greedy one.

        The beginning of a context that does not fit is left out, as the harness's own models do.
        """
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=1)
        prompts = [(context + continuation)[-self.max_length :] for context, continuation in pairs]
        completions = self._engine.generate(prompts, params, adapter=self._adapter) if prompts else []
        scores = []
        for (_, continuation), completion in zip(pairs, completions, strict=True):
            assert completion.prompt_logprobs is not None
            tail = completion.prompt_logprobs[len(completion.prompt_logprobs) - len(continuation) :]
            own = [entry for entry in tail if entry is not None]  # the first token of all has nothing before it
            is_greedy = all(entry.top[0][0] == entry.token_id for entry in own)
            scores.append((sum(entry.logprob for entry in own), is_greedy))
        return scores

    def complete(self, prompt: list[int], until: Sequence[str], params: SamplingParams) -> str:
        """The text of a completion up to the first of the strings `until`."""
        room = self.max_length - (params.max_tokens or 0)
        self._engine.add("harness", prompt[-max(1, room) :], params, adapter=self._adapter)
        decoder, text = StreamDecoder(self._tokenizer), ""
        while self._engine.has_unfinished():
            for output in self._engine.step():
                text += decoder.push(output.token_ids)
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                self._engine.abort("harness")
                while self._engine.has_unfinished():
                    self._engine.step()
                return text[: min(ends)]
        return text + decoder.flush()


def build_lm(engine: Engine, tokenizer: Tokenizer, adapter: str | None = None) -> Any:
    """A `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=…)`.

    Raises:
        ConfigError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise ConfigError(f"tasks need the lm-evaluation-harness ({error}): pip install lm-eval") from error
    scorer = EngineScorer(engine, tokenizer, adapter)

    class EngineLM(TemplateLM):  # type: ignore[misc]
        """See EngineScorer; the methods are those of the harness."""

        tokenizer_name = "llama31"
        max_length = scorer.max_length
        max_gen_toks = _MAX_NEW_TOKENS

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_id if tokenizer.eos_id is not None else 0)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_id is None else int(tokenizer.bos_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string, bos=bool(add_special_tokens), allowed_special="all")

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
                totals.append(sum(s for s, _ in scorer.score([make_disjoint_window(window) for window in windows])))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, options: dict[str, Any]) -> str:
            until = options.get("until") or []
            params = SamplingParams(
                max_tokens=int(options.get("max_gen_toks", self.max_gen_toks)),
                temperature=float(options.get("temperature", 0)) if options.get("do_sample") else 0,
                top_p=float(options.get("top_p", 1)),
            )
            return scorer.complete(self.tok_encode(context), [until] if isinstance(until, str) else until, params)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            ids = ChatFormat(tokenizer).encode_dialog(chat_history, add_generation_prompt=add_generation_prompt).ids
            return tokenizer.decode(ids)

    return EngineLM()
