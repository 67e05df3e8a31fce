"""Causal language models of transformers: uncertainty per token, per text, and while generating.

    token_uncertainty(predictor, input_ids, attention_mask)      how sure each token of a text was
    sequence_uncertainty(predictor, input_ids, attention_mask)   the same for whole texts
    generate(predictor, input_ids, max_new_tokens=20, ...)       new text, with variance in the cache

Any decoder with `generate` works (GPT-2, LLaMA, ...); no class is special. Cached keys and values
are Gaussian tensors, so a step costs one token and has the moments of the whole forward pass. Only
`shared="carry"` differs: it averages over the positions at hand, of which a step sees one.

Assumption: logits of one token are Gaussian, see docs/assumptions.md#probabilities. How the tokens of a text
depend on each other is unknown to the single pass; `SequenceUncertainty` states two bounds.
"""

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bayespass.batches import model_output
from bayespass.errors import InvalidInput, UnsupportedOp
from bayespass.gaussian import unwrap
from bayespass.link import ROW_ELEMENTS, Correlation, Link, mutual_information, softmax_link
from bayespass.moments import as_moments
from bayespass.predict.propagation import SinglePass, _located
from bayespass.predict.sampling import in_single_precision
from bayespass.predict.snapshot import check_eval

# What `generate` cannot follow: other forward passes than one per new token, or a cache of plain tensors.
REFUSED = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "custom_generate",
    "guidance_scale", "past_key_values",
)  # fmt: skip
CACHES = (None, "dynamic", "offloaded")


@dataclass(frozen=True, eq=False)
class SequenceUncertainty:
    """What the tokens of a text add up to.

    Args:
        log_prob: (B,) sum of the log predictive probabilities, in nats. It averages each token over
            its own weights given the text before it, not the whole text over one draw.
        n_tokens: (B,) tokens that were predicted.
        entropy: (B,) mean predictive entropy per token, in nats.
        mutual_information: (B,) sum of its epistemic parts, in nats.
        variance_independent: (B,) variance of the text's log-likelihood, in nats^2, if the noise of
            its tokens were independent: the sum of variances.
        variance_shared: (B,) the same if one common factor moved all tokens together: the squared
            sum of standard deviations, which no dependence can exceed (Cauchy-Schwarz).

    The truth lies between the two, as far as each token's variance is right and tokens are not
    negatively correlated: at the first for varied text, at the second for repeated text.
    """

    log_prob: Tensor
    n_tokens: Tensor
    entropy: Tensor
    mutual_information: Tensor
    variance_independent: Tensor
    variance_shared: Tensor

    @property
    def perplexity(self) -> Tensor:
        """(B,) exp(-log_prob / n_tokens); NaN where no token was predicted."""
        return (-self.log_prob / self.n_tokens).exp()


@dataclass(frozen=True, eq=False)
class TokenUncertainty:
    """How each token of a text was predicted from the tokens before it; zero where it was not.

    Args:
        scored: (B, T) bool; false for padding and for a token that nothing precedes.
        log_prob: (B, T) log of the token's predictive probability, in nats.
        entropy: (B, T) of the predictive distribution the token came from, in nats.
        mutual_information: (B, T) its epistemic part, see `bayespass.link.mutual_information`.
        log_prob_variance: (B, T) variance of the token's log-probability over weights, in nats^2:
            sum_i g_i^2 v_i with g = onehot - p at the predictive p, which is the expected gradient.
        logit_variance: (B, T) variance of the token's own logit.
    """

    scored: Tensor
    log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor
    log_prob_variance: Tensor
    logit_variance: Tensor

    @property
    def expected_entropy(self) -> Tensor:
        """(B, T) entropy that would remain if the weights were known: entropy less mutual information."""
        return self.entropy - self.mutual_information

    def sequences(self) -> SequenceUncertainty:
        """The figures of whole texts, over their scored tokens."""
        n_tokens = self.scored.sum(-1)
        return SequenceUncertainty(
            log_prob=self.log_prob.sum(-1),
            n_tokens=n_tokens,
            entropy=self.entropy.sum(-1) / n_tokens,
            mutual_information=self.mutual_information.sum(-1),
            variance_independent=self.log_prob_variance.sum(-1),
            variance_shared=self.log_prob_variance.sqrt().sum(-1).square(),
        )


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated text and how uncertain it is.

    Args:
        sequences: (B, T + N) prompt and new tokens, as `generate` of transformers returns them.
        tokens: (B, N) each field, for the new tokens; zero and not scored after a text's end.
            Probabilities are the model's own, before temperature, top-k and other processors.
        whole: (B,) the same for the new text as a whole.
    """

    sequences: Tensor
    tokens: TokenUncertainty
    whole: SequenceUncertainty


def token_uncertainty(
    predictor: SinglePass, input_ids: Tensor, attention_mask: Tensor | None = None, **model_kwargs: Any
) -> TokenUncertainty:
    """How each token of the texts was predicted from those before it.

    Args:
        predictor: a single pass over a causal language model.
        input_ids: (B, T) tokens.
        attention_mask: (B, T), 0 at padding, on either side. Left-padded texts get the position
            numbers that they have without padding, if the model takes `position_ids`.
        **model_kwargs: further arguments of the model.

    Raises:
        InvalidInput: the predictor's model is no causal language model, or shapes do not fit.
    """
    model = language_model(predictor)
    mask = _checked_mask(input_ids, attention_mask)
    if attention_mask is not None:
        model_kwargs["attention_mask"] = attention_mask
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if takes_positions and "position_ids" not in model_kwargs and not bool(mask[:, 0].all()):
            model_kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        mean, variance, correlation = predictor.correlated_moments(input_ids=input_ids, **model_kwargs)
        scored = mask.clone()
        scored[:, 0] = False
        scored[:, 1:] &= mask[:, :-1]
        found = _zeros(scored, in_single_precision(mean))
        places = scored.nonzero()
        for part in places.split(max(1, ROW_ELEMENTS // mean.shape[-1])):
            row, place = part.unbind(-1)
            seen = row, place - 1
            step = Step.of(mean[seen], variance[seen], predictor.link, correlation and correlation.at(*seen))
            for name, values in step.at(input_ids[row, place].unsqueeze(-1)).items():
                found[name][row, place] = values.squeeze(-1)
    return TokenUncertainty(scored, **found)


def sequence_uncertainty(
    predictor: SinglePass, input_ids: Tensor, attention_mask: Tensor | None = None, **model_kwargs: Any
) -> SequenceUncertainty:
    """Log predictive probability, perplexity and uncertainty of whole texts.

    Args:
        predictor: see `token_uncertainty`.
        input_ids: (B, T) tokens.
        attention_mask: (B, T), 0 at padding.
        **model_kwargs: further arguments of the model.
    """
    return token_uncertainty(predictor, input_ids, attention_mask, **model_kwargs).sequences()


def generate(
    predictor: SinglePass, input_ids: Tensor, *, seed: int | None = None, **generate_kwargs: Any
) -> Generation:
    """Text by the `generate` of transformers, from predictive probabilities, with its uncertainty.

    Greedy search, sampling and beam search with all their processors and stopping criteria see the
    log of the predictive probabilities as logits. The variance of keys and values is cached with
    them.

    Args:
        predictor: a single pass over a causal language model.
        input_ids: (B, T) prompts; pad them on the left and pass `attention_mask`.
        seed: of sampling; the global generator is left as it was. `None` draws from the global one.
        **generate_kwargs: what `generate` of transformers takes.

    Raises:
        InvalidInput: the model is no causal language model, the approximation shares variance over
            tokens, or an argument asks for decoding that runs other forward passes (an assistant,
            guidance) or for a cache of plain tensors.
    """
    model = language_model(predictor)
    if predictor.approximation.shared == "carry":
        msg = "a cache does not hold what all tokens of a text share; build the predictor with approximation='cvp'"
        raise InvalidInput(msg)
    _checked_mask(input_ids, generate_kwargs.get("attention_mask"))
    if generate_kwargs.get("guidance_scale") == 1:
        del generate_kwargs["guidance_scale"]
    config = generate_kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def option(name: str) -> Any:
        return generate_kwargs.get(name, getattr(config, name, None))

    asked = [name for name in REFUSED if option(name) not in (None, False)]
    asked += ["cache_implementation"] if option("cache_implementation") not in CACHES else []
    if asked:
        msg = f"generation with variance runs one cached forward pass per token and does not follow {', '.join(asked)}"
        raise InvalidInput(msg)
    recorder = Recorder(predictor, len(input_ids))
    generate_kwargs["stopping_criteria"] = [*(generate_kwargs.get("stopping_criteria") or ()), recorder]
    generate_kwargs["return_dict_in_generate"] = True
    cards = [input_ids.device] if input_ids.device.type == "cuda" else []
    with torch.random.fork_rng(cards, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = running(predictor, recorder).generate(input_ids, **generate_kwargs)
    new = output.sequences[:, input_ids.shape[1] :]
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        live = _before_the_end(new, option("eos_token_id"), option("pad_token_id"))
        beams = torch.arange(len(new), device=new.device).unsqueeze(-1).expand_as(new)
    else:
        live = beams >= 0
    tokens = recorder.along(new, beams.clamp(min=0), live)
    return Generation(output.sequences, tokens, tokens.sequences())


@dataclass(frozen=True, eq=False)
class Step:
    """The predictive distribution of one next token for each of R rows, ready to be read off.

    Args:
        log_probs: (R, V) log predictive probabilities, not below the smallest normal number's.
        variance: (R, V) of the logits.
        entropy: (R,) of the predictive distribution.
        mutual_information: (R,) its epistemic part.
        spread: (R,) sum_i p_i^2 v_i.
    """

    log_probs: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor
    spread: Tensor

    @staticmethod
    def of(mean: Tensor, variance: Tensor, link: Link, correlation: Correlation | None = None) -> "Step":
        """From logit moments (R, V); half precision is worked on in float32."""
        mean, variance = in_single_precision(mean), in_single_precision(variance)
        probs = softmax_link(mean, variance, link, correlation)
        return Step(
            log_probs=probs.clamp(min=torch.finfo(probs.dtype).tiny).log(),
            variance=variance,
            entropy=torch.special.entr(probs).sum(-1),
            mutual_information=mutual_information(mean, variance),
            spread=(probs.square() * variance).sum(-1),
        )

    def at(self, tokens: Tensor) -> dict[str, Tensor]:
        """Every figure of `TokenUncertainty` for tokens (R, K)."""
        log_prob, variance = self.log_probs.gather(-1, tokens), self.variance.gather(-1, tokens)
        of_log_prob = variance * (1 - 2 * log_prob.exp()) + self.spread.unsqueeze(-1)
        return {
            "log_prob": log_prob,
            "entropy": self.entropy.unsqueeze(-1).expand_as(log_prob),
            "mutual_information": self.mutual_information.unsqueeze(-1).expand_as(log_prob),
            "log_prob_variance": of_log_prob.clamp(min=0),
            "logit_variance": variance,
        }


class Recorder:
    """Keeps the figures of the tokens that each step may choose, as a criterion that never stops.

    Stopping criteria see what was just chosen: one token per row, or all candidates of a prompt,
    each of which may continue any of its beams.
    """

    def __init__(self, predictor: SinglePass, n_prompts: int) -> None:
        self.link: Link = predictor.link
        self.n_prompts = n_prompts
        self.step: Step | None = None
        self.candidates: list[Tensor] = []
        self.figures: list[dict[str, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002  a criterion's signature
        """Read off the candidates (R, K) that end `input_ids`, (prompts * K, length)."""
        assert self.step is not None, "a token was chosen before any forward pass"
        rows = len(self.step.entropy)
        tokens = input_ids[:, -1].reshape(self.n_prompts, -1).repeat_interleave(rows // self.n_prompts, 0)
        tokens = tokens.to(self.step.log_probs.device)
        self.candidates.append(tokens)
        self.figures.append(self.step.at(tokens))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def along(self, new: Tensor, rows: Tensor, live: Tensor) -> TokenUncertainty:
        """The figures of the final texts.

        Args:
            new: (B, N) tokens.
            rows: (B, N) which row of each step's batch they were chosen in.
            live: (B, N) bool, whether the text had not ended before.
        """
        like = self.figures[0]["log_prob"]
        new, rows, live = new.to(like.device), rows.to(like.device), live.to(like.device)
        found = _zeros(live, like)
        for n in range(new.shape[1]):
            fits = self.candidates[n][rows[:, n]] == new[:, n : n + 1]
            which = fits.int().argmax(-1)
            for name, values in self.figures[n].items():
                found[name][:, n] = values[rows[:, n], which].masked_fill(~live[:, n], 0)
        return TokenUncertainty(live, **found)


def running(predictor: SinglePass, recorder: Recorder) -> Any:
    """The predictor's model with a forward that propagates variance and answers log predictive probabilities.

    It shares its modules with the predictor's private copy. Of the logits the last position is
    kept; everything else of the output, such as the Gaussian cache, is as the model made it.
    """
    model = predictor.model
    check_eval(model)
    runner = copy.copy(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            output = functional_call(model, predictor.gaussian_parameters(), args, kwargs)
        except UnsupportedOp as error:
            raise type(error)(_located(error, model)) from error
        logits = as_moments(unwrap(model_output(output), []))
        mean = logits.mean[:, -1]
        variance = torch.zeros_like(mean) if logits.var is None else logits.var[:, -1]
        recorder.step = Step.of(mean, variance, recorder.link)
        output.logits = recorder.step.log_probs.unsqueeze(1)
        return output

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]  # transformers reads it
    runner.forward = forward
    runner._forward_hooks, runner._forward_pre_hooks = OrderedDict(), OrderedDict()  # the model's own run inside
    return runner


def language_model(predictor: SinglePass) -> Any:
    """The predictor's model, if it is a causal language model of transformers.

    Raises:
        InvalidInput: it is not.
    """
    model: Any = getattr(predictor, "model", predictor)
    likelihood = predictor.info.likelihood if isinstance(predictor, SinglePass) else "no posterior"
    decoder = hasattr(model, "generate") and not getattr(model.config, "is_encoder_decoder", False)
    if not decoder or likelihood != "classification":
        msg = (
            f"the predictor must be a SinglePass over a decoder-only language model of transformers with a "
            f"classification posterior; got {type(predictor).__name__} over {type(model).__name__} ({likelihood})"
        )
        raise InvalidInput(msg)
    return model


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as bool, all true if there is none.

    Raises:
        InvalidInput: shapes or types do not fit.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        msg = f"input_ids must be integers (B, T); got {tuple(input_ids.shape)} of {input_ids.dtype}"
        raise InvalidInput(msg)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)} and {tuple(input_ids.shape)}"
        msg = f"attention_mask must have the shape of input_ids; got {shapes}"
        raise InvalidInput(msg)
    return attention_mask != 0


def _zeros(scored: Tensor, like: Tensor) -> dict[str, Tensor]:
    names = [field.name for field in fields(TokenUncertainty) if field.name != "scored"]
    return {name: torch.zeros(scored.shape, dtype=like.dtype, device=like.device) for name in names}


def _before_the_end(new: Tensor, eos: Any, pad: Any) -> Tensor:
    """(B, N) bool: up to a text's end token, or what is not padding behind its last token."""
    ends = torch.as_tensor([] if eos is None else eos, dtype=new.dtype, device=new.device).reshape(-1)
    is_end = torch.isin(new, ends).int()
    live = is_end.cumsum(-1) - is_end == 0
    if pad is not None and len(ends) and not bool((ends == pad).any()):
        live &= (new == pad).flip(-1).int().cumprod(-1).flip(-1) == 0
    return live
