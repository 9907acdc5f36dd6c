"""Published scaling laws: compute-optimal tokens, expert granularity, vocabulary size.

Every constant is the source's own. The laws were fitted on small models; what is asked of them
beyond the range of the fit is an extrapolation, and the plan says so.
"""

from __future__ import annotations

import math

from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning.flops import forward_flops
from seodang.foundation.planning.parameters import active_parameters, vocabulary_parameters

FITTED_FLOPS = (3e17, 3e20)  # budgets that Tian et al. trained at (section 2.2)
OPTIMAL_GRANULARITY = (8, 12)  # abstract and section 4.1.2, with balanced experts

# Tian et al., table 1 (mixture of experts): M = a·C^b FLOPs a token, D = C / M tokens.
_MODEL_SCALE = (0.1915, 0.5095)
# Tian et al., table 2: equation 13, and the saturation of equation 10.
_A, _D, _GAMMA, _BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
_A_START, _A_MAX = 1.63e-2, 5.28e16


def granularity(config: ModelConfig) -> float:
    """G = 2·width / neurons of an expert (Tian et al., arXiv 2507.17702, section 2.1)."""
    return 2 * config.hidden_size / config.expert_intermediate_size


def activation_ratio(config: ModelConfig) -> float:
    """A = (routed + shared of a token) / (routed + shared of a layer), section 2.1."""
    return (config.experts_per_token + config.shared_experts) / (
        config.experts + config.shared_experts
    )


def efficiency_leverage(ratio: float, granularity: float, flops: float) -> float:
    """Compute that a dense model needs for the same loss, over the compute of this one.

    ``ratio`` and ``granularity`` as above, ``flops`` the training budget. Source: Tian et al.,
    arXiv 2507.17702, equation 13 with table 2. The paper does not name the base of its
    logarithms. Decimal ones of compute and binary ones of granularity are the reading under which
    the printed constants give what the paper states of them: an optimum within 8 to 12, and more
    than 7 at 1e22 FLOPs, A = 3.1 % and G = 12.
    """
    saturated = 1 / (1 / (ratio + 1 / (1 / _A_START - 1 / _A_MAX)) + 1 / _A_MAX)
    fine = math.log2(granularity)
    return float(saturated ** (_A + _D * math.log10(flops) + _GAMMA * fine**2 + _BETA * fine))


def non_embedding_flops(config: ModelConfig, context: int) -> float:
    """M: training FLOPs of a token without the vocabulary's products (section 2.1, appendix C).

    The multi-token-prediction layers are left out as well: no model of the fit had one.
    """
    forward = forward_flops(config, context)
    return 3 * (sum(forward.values()) - forward["output head"])


def optimal_model_scale(flops: float) -> float:
    """M that makes the most of a budget: 0.1915·C^0.5095 FLOPs a token (table 1)."""
    a, b = _MODEL_SCALE
    return float(a * flops**b)


def optimal_tokens(model_scale: float) -> float:
    """Tokens for which a model of M FLOPs a token is the one that table 1 asks for.

    The inverse of :func:`optimal_model_scale`: C = (M / 0.1915)^(1 / 0.5095), and D = C / M.
    """
    a, b = _MODEL_SCALE
    return float((model_scale / a) ** (1 / b) / model_scale)


def chinchilla_tokens(config: ModelConfig) -> float:
    """Twenty tokens a parameter (Hoffmann et al., arXiv 2203.15556, table 3), here active ones."""
    return 20.0 * active_parameters(config)


def optimal_learning_rate(flops: float) -> float:
    """Of AdamW: 1.1576·C^-0.1529 (Tian et al., equation 3)."""
    return float(1.1576 * flops**-0.1529)


def optimal_batch_tokens(flops: float) -> float:
    """Tokens of an optimizer step: 0.0694·C^0.3644 (Tian et al., equation 3)."""
    return float(0.0694 * flops**0.3644)


def optimal_vocabulary(config: ModelConfig) -> dict[str, float]:
    """Vocabulary sizes that Tao et al. (arXiv 2407.13623) would choose, by approach.

    All start from the parameters that do not grow with the vocabulary; of a mixture of experts we
    take the active ones (the laws were fitted on dense models of up to 3 B). Constants: the
    authors' ``optimal_Nv_predict.py``. IsoFLOPs (section 4.1): N_nv = e^-2.4847·C^0.5 gives C,
    N_v = e^-1.5890·C^0.41636. Derivative (section 4.2): N_v = 3,145,728·(N_nv / 33 M)^0.8354.
    The size is N_v / width.
    """
    others = active_parameters(config) - vocabulary_parameters(config)
    flops = (others / math.exp(-2.4846510161625193)) ** 2
    by_flops = math.exp(-1.589031299255507) * flops**0.4163622634135234
    by_derivative = 3_145_728 * (others / 33_000_000) ** 0.8353974035228025
    return {
        "isoflops": by_flops / config.hidden_size,
        "derivative": by_derivative / config.hidden_size,
    }
