"""What the plan cites. Keys are used beside formulas, the texts are printed below the tables."""

from __future__ import annotations

SOURCES = {
    "axk1": "A.X K1 technical report, arXiv 2601.09200; shapes: AXK1ForCausalLM of transformers",
    "dsv2": "DeepSeek-V2, arXiv 2405.04434: multi-head latent attention and its cache",
    "dsv3": "DeepSeek-V3, arXiv 2412.19437, section 2.2: multi-token prediction",
    "kaplan": "Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 2 FLOPs a weight, backward twice",
    "palm": "PaLM, arXiv 2204.02311, section 4.1 and appendix B: attention, utilisation",
    "zero": "ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, sections 3 and 5",
    "korthikanti": "Korthikanti et al. 2022, arXiv 2205.05198, section 4: activations",
    "tian": "Tian et al. 2025, arXiv 2507.17702: eq. 3, 13, tables 1, 2; fits of 3e17-3e20 FLOPs",
    "chinchilla": "Hoffmann et al. 2022, arXiv 2203.15556, table 3: about 20 tokens a parameter",
    "tao": "Tao et al. 2024, arXiv 2407.13623, section 4, and their optimal_Nv_predict.py",
    "nvidia": "NVIDIA data sheets of A100, H100 and H200 (SXM): bfloat16 without sparsity",
}


def number(key: str) -> int:
    """The number that a source has below the tables, from 1."""
    return list(SOURCES).index(key) + 1
