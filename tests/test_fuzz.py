"""Wrong arguments to everything public: each is refused in one sentence, or it makes sense.

`VALID` holds arguments that work for every class and function that a reader may call. Each argument
in turn is replaced by things of another kind, of another size or of none. What nflib has and the
table has not is found by looking, so that nothing new is left out.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import ExpTransform, Independent, Normal, constraints

from nflib import checkpoints
from nflib.core import Compose, Flow, Layer, Model, StandardNormal
from nflib.coupling import Mask, halves
from nflib.discrete import Head, LogisticMixture, Softmax
from nflib.elementwise import Affine, Elementwise
from nflib.kernels import Kernel, Matern52
from nflib.linear import LU, Diagonal
from nflib.multiscale import Squeeze
from nflib.nets import MLP
from nflib.normalization import ActNorm
from nflib.pixel import PixelModel
from nflib.residual import Exact, LipschitzConvNet, LipschitzMLP, Series
from nflib.residual.lipschitz import SpectralNorm
from nflib.variational import ConvDecoder, ConvEncoder
from nflib.wavenet import CausalStack, ParallelWaveNet, WaveNet

FLOORS = """
arguments cache graphs rootfinding core checks elementwise coupling autoregressive linear
convolution normalization multiscale dequantization planar precision prepared mixer nets discrete
domains reversible conditioning residual kernels models pixel wavenet variational
""".split()

# Arithmetic that layers do in every step, where a check would cost time, and what speaks for the
# class or function that calls it.
HELPERS = """
arguments.checked arguments.integer arguments.number arguments.real arguments.show arguments.whole
cache.fresh cache.is_traced cache.kept cache.made_ready cache.ready
graphs.beside graphs.record_on_gpu graphs.recorder_for graphs.replayed rootfinding.solve_increasing
core.check_finite core.check_levels core.check_values core.describe core.expand_log_det core.fits
core.full_precision core.in_turn core.is_known core.log_det_dtype core.log_normal
core.require_bijection core.sum_event core.sum_log_det core.zeros_log_det
elementwise.invert_logit_mixture elementwise.logit_mixture
linear.check_invertible linear.factors linear.permutation linear.place linear.random_rotation
linear.reflect linear.refresh_inverse_order linear.solve_matrix linear.solve_triangle
convolution.rotation_kernel normalization.centre_and_spread normalization.moments
planar.at_least planar.log_stretch planar.positive planar.solve_tanh planar.times
residual.jacobian_matrix residual.pullback residual.weighted_series
precision.is_wide precision.matrices_of precision.of_network
prepared.Joints prepared.Masked prepared.pairs
nets.elu2 nets.equal_widths nets.in_place nets.normed_weight nets.shape_of nets.vector_context
nets.widths nets.zero_init discrete.check_integers discrete.logistic_bin discrete.rows_for
reversible.compiled_whole reversible.obstacle reversible.parts reversible.replay reversible.run
wavenet.mixture_log_density
""".split()

affine, mlp, softmax = Affine(), partial(MLP, hidden=4), Softmax(4, 2)
flow = Flow(Compose(ActNorm(3), LU(3)), StandardNormal(3))
rows, waves, eye = torch.randn(6, 3), torch.randn(2, 16), torch.eye(4)
layer = {"layer": Diagonal(3).double(), "x": rows.double(), "context": None}
common = {"context_dim": 2, "dropout": 0.1}
model = {**common, "grey_levels": 4, "hidden": (4, 4)}
deep = {**model, "layers": 1}
network = {**common, "inputs": 2, "outputs": 3, "hidden": (4, 4)}
maf = {**deep, "dim": 3, "elementwise": affine, "order": "random", "residual": False}
made = {**common, "dim": 3, "hidden": (4, 4), "order": (2, 0, 1), "residual": False}
pixels = {**common, "shape": (2, 4, 4), "levels": 4, "width": 4, "order": (1, 0), "head": softmax}
stack = {"channels": 2, "skip": 2, "layers": 2, "blocks": 1, "kernel": 2, "context_dim": 2}
teacher = WaveNet(4, 2, 2, layers=1, head=LogisticMixture(4, components=2))
contraction = {"hidden": (4, 4), "bound": 0.9, "context_dim": 2}
coder = {"shape": (2, 4, 4), "patch": 2, "width": 4, "hidden": 4}
board = {"channels": 2, "height": 3, "width": 2, "flip": False}
convolution = {"channels": 2, "kernel_size": 3, "bias": True}

VALID: dict[str, dict[str, Any]] = {
    "cache.cached": {"model": flow},
    "graphs.HostReads": {},
    "graphs.Replayed": {
        **{"function": torch.sin, "device": torch.device("cpu"), "enabled": True, "warm_up": 2}
    },
    "graphs.captured": {"model": flow},
    "core.Base": {"shape": 3},
    "core.Bijection": {},
    "core.Compose": {"*layers": (LU(3), Diagonal(3))},
    "core.Flow": {"bijection": LU(3), "base": StandardNormal(3)},
    "core.Inverse": {"bijection": LU(3)},
    "core.Layer": {},
    "core.Model": {},
    "core.StandardLogistic": {"shape": (3, 2)},
    "core.StandardNormal": {"shape": (3,)},
    "core.Stochastic": {},
    "core.TorchBase": {"distribution": Independent(Normal(torch.zeros(3), torch.ones(3)), 1)},
    "checks.check_autocast": {**layer, "report": None, "tolerance": 0.05},
    "checks.check_autoregressive": {
        **{"function": lambda x: x.cumsum(1) - x, "x": rows, "order": (0, 1, 2)},
        **{"strict": False, "randomize": True, "seed": 0},
    },
    "checks.check_batch_independence": {**layer, "report": None},
    "checks.check_bijection": {**layer, "randomize": True, "compile": False, "seed": 0},
    "checks.check_compile": {**layer, "report": None, "backend": "eager"},
    "checks.check_gradients": {"model": Diagonal(3), "x": rows, "context": None, "report": None},
    "checks.check_inverse": {**layer, "report": None, "tolerance": 1e-3},
    "checks.check_log_det": {**layer, "report": None, "tolerance": 1e-3},
    "checks.check_normalized": {
        **{"model": StandardNormal(1), "context": None, "limits": (-6.0, 6.0)},
        **{"points": 50, "dim": 1, "tolerance": 0.9},
    },
    "checks.check_onto": {
        **{**layer, "report": None, "radius": 3.0, "draws": 4},
        **{"tolerance": 1e-3, "randomize": True, "seed": 0},
    },
    "checks.check_state": {**layer, "report": None},
    "checks.check_vmap": {**layer, "report": None},
    "checks.jacobian": {"function": torch.sin, "x": rows},
    "checks.randomize_parameters": {"module": Diagonal(3), "seed": 0, "scale": 0.5},
    "elementwise.Additive": {},
    "elementwise.Affine": {"bound": 2.0},
    "elementwise.Elementwise": {},
    "elementwise.LogisticMixtureCDF": {"components": 3, "bound": 2.0},
    "elementwise.MonotoneNet": {"units": 3, "layers": 2, "bound": 2.0},
    "elementwise.Pointwise": {"elementwise": affine, "shape": (3,)},
    "elementwise.RationalQuadraticSpline": {"bins": 4, "limit": 4.0, "minimum": 1e-3},
    "coupling.CheckerboardMask": board,
    "coupling.Coupling": {"mask": halves(3), "elementwise": affine, "network": mlp, "limit": 4.0},
    "coupling.DimensionMask": {"keep": (True, False)},
    "coupling.Injector": {
        **{"channels": 4, "elementwise": affine, "network": mlp, "context_dim": 2}
    },
    "coupling.Mask": {},
    "coupling.alternating": {"dim": 4, "flip": False},
    "coupling.channels": {"count": 4, "flip": False},
    "coupling.checkerboard": board,
    "coupling.halves": {"dim": 4, "flip": False},
    "autoregressive.MADE": {**made, "count": 2},
    "autoregressive.MaskedAutoregressive": {
        **{**made, "elementwise": affine, "solver": "jacobi", "limit": 4.0}
    },
    "autoregressive.MaskedLinear": {"mask": torch.ones(2, 3, dtype=torch.bool), "zero": False},
    "linear.BlockDiagonal": {"dim": 4, "block": 2, "bias": True},
    "linear.Dense": {"dim": 4, "bias": True, "weight": eye},
    "linear.Diagonal": {"dim": 4, "bias": True},
    "linear.Householder": {"dim": 4, "reflections": 2, "bias": True},
    "linear.LU": {"dim": 4, "bias": True, "weight": eye},
    "linear.Linear": {"dim": 4, "bias": True},
    "linear.Permutation": {"order": (1, 0, 2)},
    "linear.Triangular": {"dim": 4, "bias": True, "upper": False, "weight": eye},
    "convolution.CausalConv": {**convolution, "reverse": False},
    "convolution.EmergingConv": convolution,
    "convolution.Invertible1x1Conv": {"channels": 2, "parametrization": "lu", "bias": True},
    "convolution.PeriodicConv": convolution,
    "normalization.ActNorm": {"dim": 4},
    "normalization.BatchNorm": {"dim": 4, "momentum": 0.1, "eps": 1e-5},
    "normalization.PerDimension": {"dim": 4},
    "multiscale.MultiScale": {"shape": (1, 4, 4), "*levels": (Squeeze(), ActNorm(2))},
    "multiscale.Squeeze": {"factor": 2},
    "dequantization.Dequantization": {"levels": 4},
    "dequantization.Logit": {"alpha": 0.1},
    "dequantization.UniformDequantization": {"levels": 4},
    "dequantization.VariationalDequantization": {"levels": 4, "bijection": ActNorm(6)},
    "planar.ConditionedParameters": {"dim": 4, "context_dim": 2},
    "planar.Planar": {"dim": 4, "context_dim": 2},
    "planar.Radial": {"dim": 4, "context_dim": 2},
    "planar.Sylvester": {"dim": 4, "rank": 2, "context_dim": 2},
    "prepared.Prepared": {"model": flow},
    "mixer.AlongChannels": {"bijection": LU(3)},
    "mixer.AlongPatches": {"bijection": LU(3)},
    "mixer.Bands": {"shape": (2, 4, 4), "rows": 2},
    "mixer.Patches": {"shape": (2, 4, 4), "patch": (2, 2)},
    "mixer.Shift": {"*steps": (1, -1)},
    "nets.ConvNet": network,
    "nets.GatedAttention": {"width": 4, "heads": 2, "size": (6, 6)},
    "nets.GatedConv": {"width": 4, "dropout": 0.1},
    "nets.GatedConvNet": {**network, "blocks": 1, "heads": 2, "size": (6, 6)},
    "nets.MLP": {**network, "activation": nn.ELU, "weight_norm": False},
    "nets.NormedConv2d": {"inputs": 2, "outputs": 3, "kernel": 3, "padding": 1},
    "nets.NormedLinear": {"inputs": 2, "outputs": 3},
    "nets.ResidualConvNet": {**network, "weight_norm": False},
    "nets.ResidualMLP": {**network, "activation": nn.ELU},
    "discrete.Bernoulli": {"channels": 2},
    "discrete.Head": {"levels": 4, "channels": 2},
    "discrete.LogisticMixture": {"levels": 4, "channels": 2, "components": 3},
    "discrete.Softmax": {"levels": 4, "channels": 2},
    "domains.TorchTransform": {"transform": ExpTransform().inv},
    "domains.from_domain": {"constraint": constraints.positive},
    "reversible.Reversible": {"*layers": (LU(3), Diagonal(3))},
    "reversible.turn_on": {"model": Flow(Compose(LU(3)), StandardNormal(3))},
    "models.dequantize": {"grey_levels": 4},
    "models.normalize": {"dim": 4, "kind": "actnorm"},
    "models.flowpp": {
        **{**model, "shape": (1, 4, 4), "blocks": 1, "components": 2, "couplings": (1, 1, 0)},
        **{"attention": 2, "elementwise": affine, "dequantization": "variational"},
        **{"noise_couplings": 1},
    },
    "models.glow": {**model, "shape": (1, 4, 4), "levels": 2, "steps": 1, "elementwise": affine},
    "models.iaf": {**maf, "normalization": "batchnorm"},
    "models.maf": {**maf, "normalization": "batchnorm"},
    "models.mixerflow": {
        **{**deep, "shape": (1, 4, 4), "patch": (2, 2), "mixing": "channels", "shift": 1},
        **{"extraction": "patches", "normalization": "batchnorm", "linear": "none"},
        **{"flow": "maf", "elementwise": affine, "network": mlp},
    },
    "models.naf": {**deep, "dim": 4, "units": 2, "depth": 2},
    "models.nice": {**deep, "dim": 4},
    "models.realnvp": {**deep, "shape": (1, 4, 4), "levels": 2, "normalization": "batchnorm"},
    "models.spline_flow": {**deep, "dim": 4, "bins": 2, "limit": 4.0},
    "pixel.GatedPixelCNN": {**pixels, "layers": 2, "kernel": 3, "first_kernel": 3},
    "pixel.PixelCNN": {**pixels, "blocks": 1, "kernel": 3},
    "pixel.PixelCNNPP": {
        **{**pixels, "blocks": 1, "sizes": 2, "components": 2, "head": LogisticMixture(4, 2, 2)}
    },
    "pixel.PixelModel": {"shape": (2, 4, 4), "head": softmax, "context_dim": 2, "order": (1, 0)},
    "pixel.PixelRNN": {**pixels, "kind": "row", "layers": 1, "kernel": 3},
    "pixel.WindowConv": {
        **{"inputs": 2, "outputs": 3, "rows": (-1, 0), "cols": (-1, 1)},
        **{"mask": torch.ones(3, 2, 2, 3), "stride": 1, "scale": 0},
    },
    "pixel.channel_mask": {"inputs": 4, "outputs": 4, "groups": 2, "strict": False},
    "pixel.masked_conv": {"inputs": 4, "outputs": 4, "kernel": 3, "groups": 2, "strict": False},
    "wavenet.CachedSteps": {
        **{"stack": CausalStack(1, 2, 2, 2, 2, context_dim=2), "batch": 2},
        **{"context": torch.randn(2, 2)},
    },
    "wavenet.CausalAffine": {**stack, "scale": 1.0, "bound": 6.0},
    "wavenet.CausalStack": {**stack, "inputs": 2, "outputs": 3},
    "wavenet.ParallelWaveNet": {**stack, "flows": 1, "scale": 0.1},
    "wavenet.WaveNet": {**stack, "levels": 4, "head": Softmax(4), "one_hot": False},
    "wavenet.distillation_loss": {
        **{"student": ParallelWaveNet(1, 2, 2, layers=1), "teacher": teacher, "z": waves},
        **{"context": None, "draws": 2},
    },
    "wavenet.pad": {"x": torch.zeros(2, 5, dtype=torch.long), "lengths": torch.tensor([3, 5])},
    "wavenet.power_loss": {"x": waves, "y": waves.flip(0), "window": 8},
    "wavenet.spectrum_power": {"x": waves, "window": 8},
    "variational.ConvDecoder": {**coder, "latent_dim": 3, "head": softmax},
    "variational.ConvEncoder": {**coder, "outputs": 3, "levels": 4},
    "variational.VAE": {
        **{"encoder": ConvEncoder((1, 4, 4), 6), "decoder": ConvDecoder((1, 4, 4), 3)},
        **{"posterior_flow": LU(3), "prior_flow": flow, "warm_up": 2, "free_bits": 0.5},
    },
    "variational.posterior_flow": {
        **{"kind": "sylvester", "dim": 4, "steps": 1, "context_dim": 2, "hidden": (4, 4)},
        **{"rank": 2, "batch_norm": False, "weight_norm": False},
    },
    "variational.reverse_kl": {"flow": flow, "log_density": lambda z: -z.square().sum(1), "n": 4},
    "variational.vae": {
        **{**coder, "latent_dim": 3, "flow": "sylvester", "steps": 1, "prior_steps": 1},
        **{"amortised": True, "features": 2, "flow_hidden": (4, 4), "rank": 2, "warm_up": 2},
        **{"batch_norm": False, "weight_norm": False, "free_bits": 0.5, "grey_levels": 2},
    },
    "conditioning.Conditioned": {"network": nn.Linear(3, 2), "layer": LU(3), "context_dim": 3},
    "conditioning.DenseBlock": {"width": 4},
    "conditioning.DenseEncoder": {"channels": 2, "features": 4, "blocks": 1},
    "conditioning.FeaturePyramid": {
        **{"shape": (1, 8, 8), "sizes": ((4, 4), (2, 2)), "features": 2}
    },
    "conditioning.Part": {"start": 0, "shape": (1, 2, 2)},
    "conditioning.Resize": {"size": (2, 4)},
    "conditioning.SpaceToDepth": {"factor": 2},
    "kernels.Kernel": {"dim": 3},
    "kernels.KernelConditioner": {
        **{"inputs": 2, "outputs": 4, "points": 5, "kernel": Matern52, "groups": 2},
        **{"context_dim": 2},
    },
    "kernels.Matern32": {"dim": 3},
    "kernels.Matern52": {"dim": 3},
    "kernels.SquaredExponential": {"dim": 3},
    "kernels.with_rkhs_penalty": {"weight": 1e-3},
    "models.cinn": {
        **{**model, "shape": (1, 4, 4), "context_dim": 2, "steps": 1, "levels": 2, "features": 2}
    },
    "models.ferumal": {
        **{"dim": 4, "points": 5, "layers": 1, "backbone": "glow", "kernel": Matern52},
        **{"context_dim": 2, "grey_levels": 4},
    },
    "models.srflow": {
        **{"shape": (1, 4, 4), "scale": 2, "steps": 1, "hidden": (4, 4), "levels": 2},
        **{"features": 4, "blocks": 1, "transitions": 1, "dropout": 0.1, "grey_levels": 4},
    },
    "models.residual_flow": {
        **{"shape": (1, 4, 4), "layers": 1, "hidden": (4, 4), "levels": 2, "bound": 0.9},
        **{"log_det": Exact(), "train_log_det": Series(2), "solver": "newton"},
        **{"context_dim": 2, "grey_levels": 4},
    },
    "residual.Exact": {},
    "residual.LipSwish": {},
    "residual.LipschitzConvNet": {**contraction, "shape": (2, 4, 4)},
    "residual.LipschitzMLP": {**contraction, "dim": 3},
    "residual.LogDet": {},
    "residual.ResidualBlock": {
        **{"net": LipschitzMLP(3, 4), "log_det": Exact(), "train_log_det": Series(2)},
        **{"solver": "newton", "tolerance": 1e-6, "rounds": 50},
    },
    "residual.Roulette": {"exact_terms": 1, "mean": 2.0, "law": "poisson"},
    "residual.Series": {"terms": 2},
    "residual.SpectralConv2d": {"shape": (2, 4, 4), "outputs": 3, "kernel": 3, "bound": 0.5},
    "residual.SpectralLinear": {"inputs": 2, "outputs": 3, "bound": 0.5},
    # Of the annexes what a reader calls in every notebook.
    "metrics.bits_per_dim": {"log_prob": -3.0, "dims": 2.0, "levels": 4},
    "metrics.evaluate": {"model": flow, "x": rows, "context": None, "batch_size": 4, "samples": 1},
    "metrics.log_probs": {"model": flow, "x": rows, "context": None, "batch_size": 4, "samples": 1},
    "train.fit": {
        **{"model": flow, "data": rows, "valid": rows, "epochs": 1.0, "steps": 1, "seconds": 9.0},
        **{"batch_size": 3, "lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup": 1},
        **{"clip": 5.0, "ema": 0.5, "validate_every": 1, "patience": 1, "loss": None, "seed": 0},
        **{"checkpoint": None, "save_every": 9.0, "resume": False, "progress": False},
        **{"mixed_precision": "no", "compile": False, "capture": True},
    },
    "data.card": {"name": "moons"},
    "data.load": {"name": "moons", "split": "train", "n": 4, "seed": 0, "download": False},
    "data.log_density": {"name": "moons"},
    "data.names": {"embedded": True},
    "data.potential": {"name": "u1"},
    "checkpoints.find": {"name": "results/linear_cost.json"},
    "checkpoints.load": {"model": flow, "path": "flow.safetensors"},
    "checkpoints.names": {"prefix": "results/"},
    "checkpoints.save": {"model": flow, "path": "flow.safetensors"},
}

WRONG: dict[str, Any] = {
    **{"0": 0, "-1": -1, "3": 3, "2.5": 2.5, "nan": math.nan, "True": True, "None": None},
    **{"()": (), "(3,)": (3,), "text": "nonsense", "tensor": torch.zeros(2)},
    **{"module": nn.Linear(2, 2), "class": nn.Linear},
}

# Which of these make sense, by the kind of the valid argument and by the argument's name (one name
# means the same everywhere). 3 is as good a size as any, unless something else has to fit.
KINDS: dict[type, str] = {int: "3", float: "3 2.5", bool: "True"}
NAMES = {
    **dict.fromkeys(("shape", "hidden", "context_dim"), "3 (3,)"),
    **dict.fromkeys(("dropout", "heads", "attention", "padding", "scale", "warmup", "seed"), "0"),
    **dict.fromkeys(("weight_decay", "save_every"), "0"),
    **dict.fromkeys(("warm_up", "free_bits", "steps", "prior_steps"), "0"),
    "flow_hidden": "3 (3,)",
    **dict.fromkeys(("size", "patch"), "3"),
    **dict.fromkeys(("path", "checkpoint", "prefix"), "text"),
    **{"*steps": "0 -1 3", "shift": "0 -1", "network": "class"},
}
CALLS = {
    **{
        f"models.{name}.dim": "(3,)"
        for name in ("nice", "spline_flow", "naf", "maf", "iaf", "ferumal")
    },
    "linear.Permutation.order": "3",
    "metrics.bits_per_dim.dims": "() (3,)",
    "metrics.bits_per_dim.log_prob": "0 -1 nan tensor",
    # Any module can be shaken and saved, and kept nothing of. To replay, and to prepare, a model
    # needs no layers of a kind.
    "cache.cached.model": "module",
    "graphs.captured.model": "module",
    "graphs.Replayed.function": "class",
    "prepared.Prepared.model": "module",
    "checks.randomize_parameters.module": "module",
    "checkpoints.save.model": "module",
    "residual.ResidualBlock.net": "module",
    "residual.Roulette.exact_terms": "0",
    "kernels.with_rkhs_penalty.weight": "0",
    # An event's shape will do.
    "checks.check_onto.x": "3 (3,)",
    "models.dequantize.grey_levels": "None",
    "models.srflow.transitions": "0",
    "planar.ConditionedParameters.context_dim": "None",
}
# Not tried: what takes a minute, and what the error of the reader's own function would be.
LEFT_OUT = {
    "train.fit.compile.True",
    "checks.check_bijection.compile.True",
    "checks.jacobian.function.module",
    "checks.check_autoregressive.function.module",
    "checks.check_normalized.model.module",
    "train.fit.loss.module",
    "checks.check_gradients.model.module",
    "residual.ResidualBlock.net.module",
    "variational.VAE.encoder.module",
    "variational.reverse_kl.log_density.class",
}
# What is not there is named itself.
QUOTES = ("checkpoints.find", "checkpoints.load", "data.card", "data.load")


def find(key: str) -> Any:
    module, name = key.rsplit(".", 1)
    return getattr(importlib.import_module(f"nflib.{module}"), name)


def is_to_call(thing: Any, module: str) -> bool:
    """A class or a function of nflib, but no error, no protocol and no record of results."""
    if not getattr(thing, "__module__", "").startswith(module):
        return False
    if inspect.isclass(thing):
        is_record = hasattr(thing, "__dataclass_fields__") or hasattr(thing, "_fields")
        is_other = issubclass(thing, Exception) or getattr(thing, "_is_protocol", False)
        return not is_record and not is_other
    return inspect.isfunction(thing)


def public() -> set[str]:
    """What nflib has: what a package lists, or what a module defines without an underscore."""
    found = set()
    for floor in FLOORS:
        module = importlib.import_module(f"nflib.{floor}")
        names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
        found |= {f"{floor}.{n}" for n in names if is_to_call(getattr(module, n), module.__name__)}
    return found


def cases(key: str) -> list[tuple[str, str, Any, bool]]:
    """Argument, name of the wrong thing, the thing, whether it makes sense all the same."""
    found = []
    parameters = inspect.signature(find(key)).parameters
    for argument, valid in VALID[key].items():
        fine = f"{KINDS.get(type(valid), '')} {NAMES.get(argument, '')} "
        fine += CALLS.get(f"{key}.{argument}", "")
        if argument[0] != "*" and parameters[argument].default is None:
            fine += " None"
        for name, value in WRONG.items():
            is_same = type(value) is type(valid) and value is valid or name == repr(valid)
            if not is_same and f"{key}.{argument}.{name}" not in LEFT_OUT:
                found.append((argument, name, value, name in fine.split()))
        if type(valid) is int:
            found.append((argument, "of NumPy", np.int64(valid), True))
    return found


def call(key: str, arguments: dict[str, Any]) -> Any:
    named = {name: value for name, value in arguments.items() if name[0] != "*"}
    many = [value for name, value in arguments.items() if name[0] == "*"]
    torch.manual_seed(0)
    made = find(key)(*named.values(), *many[0]) if many else find(key)(**named)
    if key in ("cache.cached", "graphs.captured"):
        with made:
            pass
    return made


def sizes(shape: Any) -> tuple[int, ...]:
    """An event of this shape: open sizes are 6, which many numbers divide."""
    return (6,) if shape is None else tuple(6 if n is None else n for n in shape if n is not ...)


def results(made: Any, given: dict[str, Any]) -> list[Any]:
    """What comes of an ordinary use of it."""
    context = None
    if getattr(made, "context_shape", None) is not None:
        context = torch.randn(2, *sizes(made.context_shape))
    if isinstance(made, nn.Module):
        made.eval()
    if isinstance(made, Layer):
        x = 0.9 * torch.rand(2, *sizes(made.event_shape)) + 0.05
        z, log_det = made(x if made.bijective else (4 * x).floor(), context)
        return [z, log_det, *made.inverse(z, context)]
    if type(made) is PixelModel:
        return []
    if isinstance(made, Model):
        length = (5,) if isinstance(made, WaveNet | ParallelWaveNet) else ()
        x = made.sample(2, *length, context)
        return [x, made.log_prob(x, context)]
    if isinstance(made, Mask):
        return [made.kept(*sizes(made.event_shape))]
    if isinstance(made, Elementwise):
        return list(made.forward(torch.randn(2, 3), torch.zeros(2, made.count, 3)))
    if isinstance(made, Head):
        parameters = torch.zeros(2, getattr(made, "count", 1), 3)
        return [made.log_prob(torch.zeros(2, made.channels, 3), parameters)]
    if hasattr(made, "log_prob"):
        return [made.log_prob(made.sample(2))]
    if isinstance(made, Kernel):
        return [made(torch.randn(2, len(made.log_length)), torch.randn(3, len(made.log_length)))]
    if isinstance(made, nn.Module) and not isinstance(made, Flow):
        return [made(network_input(made, given), *([] if context is None else [context]))]
    return list(made) if isinstance(made, tuple) else [made]


def network_input(net: nn.Module, given: dict[str, Any]) -> Tensor:
    """Two rows of what a network takes: numbers, waveforms or images."""
    if isinstance(net, ConvEncoder):
        return torch.zeros(2, *net.shape)
    if isinstance(net, SpectralNorm):
        return torch.randn(2, *net.direction.shape)
    if isinstance(net, LipschitzConvNet):
        return torch.randn(2, *net.event_shape)
    fixed = {"FeaturePyramid": (1, 8, 8), "SpaceToDepth": (2, 6, 6), "Part": (9,)}
    fixed |= {"Resize": (2, 6, 6)}
    if type(net).__name__ in fixed:
        return torch.randn(2, *fixed[type(net).__name__])
    sizes_in = ("inputs", "width", "dim", "channels")
    count = next((given[name] for name in sizes_in if name in given), 3)
    dims = {"WindowConv": 2}.get(type(net).__name__, 0)
    dims = 2 if any(isinstance(part, nn.Conv2d) for part in net.modules()) else dims
    dims = 1 if any(isinstance(part, nn.Conv1d) for part in net.modules()) else dims
    side = given.get("size")
    sides = (side, side) if isinstance(side, int) else side or (6,) * dims
    return torch.randn(2, int(count), *sides)


def fault(key: str, argument: str, value: Any, makes_sense: bool) -> str | None:
    """What is wrong with how this argument is taken, if anything."""
    given = dict(VALID[key])
    if argument[0] == "*" and value is not given[argument]:
        value = (value, *given[argument][1:])
    given[argument] = value
    try:
        made = call(key, given)
    except ValueError as error:
        return wording(key, given, str(error), isinstance(value, np.integer))
    except Exception as error:
        return f"raises {error!r}"
    if not makes_sense:
        return "is taken"
    try:
        found = results(made, given)
    except Exception as error:
        return None if "does not define" in str(error) else f"is taken, and then: {error!r}"
    finite = all(bool(torch.isfinite(x).all()) for x in found if isinstance(x, Tensor))
    return None if finite else "is taken, and the results are not finite"


def wording(key: str, given: dict[str, Any], text: str, must_work: bool) -> str | None:
    """What is wrong with the sentence by which an argument is refused."""
    module, name = key.rsplit(".", 1)
    # An input is refused by the part that cannot take it, in this part's name.
    parts = [
        part for value in given.values() if isinstance(value, nn.Module) for part in value.modules()
    ]
    who = {name, *(type(part).__name__ for part in parts if not isinstance(part, nn.Linear))}
    words = set(re.findall(r"\w+", text))
    if must_work:
        return f"refuses a whole number of NumPy: {text}"
    if "\n" in text or not text.endswith(".") or re.search(r"[.!?] [A-Z]", text):
        return f"is refused in more or less than a sentence: {text}"
    if key in QUOTES and any(isinstance(value, str) and value in text for value in given.values()):
        return None
    if not who & words:
        return f"is refused without {name} in: {text}"
    if name in words and not {argument.strip("*") for argument in given} & words:
        return f"is refused without the name of an argument in: {text}"
    return None


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somewhere to write to, where a checkpoint lies already."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save(flow, "flow.safetensors")


def test_everything_public_has_valid_arguments() -> None:
    missing = public() - set(VALID) - set(HELPERS)
    assert not missing, f"VALID has no arguments for {sorted(missing)}."
    gone = (set(HELPERS) | {key for key in VALID if key.split(".")[0] in FLOORS}) - public()
    assert not gone, f"nflib has no {sorted(gone)}."


def test_every_argument_is_tried() -> None:
    for key, given in VALID.items():
        parameters = inspect.signature(find(key)).parameters.values()
        named = {
            p.name if p.kind != p.VAR_POSITIONAL else f"*{p.name}"
            for p in parameters
            if p.kind != p.VAR_KEYWORD and not (p.kind == p.VAR_POSITIONAL and not given)
        }
        assert set(given) == named, key


def test_there_are_many_cases() -> None:
    count = sum(len(cases(key)) for key in VALID)
    print(f"{count} wrong arguments to {len(VALID)} classes and functions.")
    assert count > 1_500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", VALID)
def test_wrong_arguments(key: str) -> None:
    faults = []
    # A class without arguments is there to be written out.
    if VALID[key] and (found := fault(key, *next(iter(VALID[key].items())), True)):
        faults.append(f"{key} with valid arguments {found}")
    for argument, name, value, makes_sense in cases(key):
        found = fault(key, argument, value, makes_sense)
        if found is not None:
            faults.append(f"{key}({argument}={name}) {found}")
    assert not faults, "\n".join(faults)
