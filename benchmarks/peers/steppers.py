"""Training steps of other toolkits, as their users take them: each toolkit's own trainer, one step at a time.

A step is forward, losses, backward, clipping or projection, optimiser, schedule and the record of dead features, with
the toolkit's default options unless an argument says otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations → reconstruction and dense features."""


@dataclass(frozen=True)
class Shape:
    """What is trained; `steps` is the length of the whole training, which schedules depend on."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    device: str

    @property
    def warmup(self) -> int:
        """Steps of a warmup that is 1,000 by default, cut so that it ends within the training."""
        return min(1000, self.steps // 20)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


class Stepper(NamedTuple):
    """A toolkit at work.

    `step(number, x)` trains on a batch `[batch, d_in]`; `rules()` ends the training and gives the dictionary's ways to
    reconstruct: "" is that of its users, "batch rule" the one of training.
    """

    step: Callable[[int, Tensor], object]
    rules: Callable[[], dict[str, Reconstruct]]


def saelens(shape: Shape, *, sparse: bool = False, autocast: bool = False, compiled: bool = False) -> Stepper:
    """`SAETrainer._train_step`; `sparse` is its option `use_sparse_activations`, `compiled` its `compile_sae`."""
    from sae_lens import saes  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    name = "TopK" if shape.architecture == "topk" else "BatchTopK"
    options: dict[str, Any] = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "device": shape.device}
    options |= {"dtype": "float32", "use_sparse_activations": sparse}
    if sparse:  # PyTorch has no backward pass of sparse codes times the norms of the decoder
        options["rescale_acts_by_decoder_norm"] = False
    made = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(**options)).to(shape.device)
    settings = SAETrainerConfig(
        total_training_samples=shape.steps * shape.batch, train_batch_size_samples=shape.batch, device=shape.device,
        lr_end=3e-5, autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=made, data_provider=iter(()))
    if compiled:  # on a CPU the graph is only captured: compiling it takes minutes
        # as in a process that trains one shape alone, which several of them here are not to slow down
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
        made.training_forward_pass = torch.compile(
            made.training_forward_pass, backend="inductor" if shape.on_gpu else "eager"
        )

    def step(number: int, x: Tensor) -> None:
        trainer._train_step(sae=trainer.sae, sae_in=x)
        trainer.n_training_steps += 1

    def rules() -> dict[str, Reconstruct]:
        made.eval()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            features = made.encode(x)
            return made.decode(features), features.to_dense()

        def by_threshold(x: Tensor) -> tuple[Tensor, Tensor]:
            """As the dictionary that it saves for its users."""
            _, pre = made.encode_with_hidden_pre(x)
            features = pre.relu() * (pre > made.topk_threshold)
            return made.decode(features), features

        return {"": reconstruct} if name == "TopK" else {"": by_threshold, "batch rule": reconstruct}

    return Stepper(step, rules)


def dictionary_learning(shape: Shape, *, autocast: bool = False) -> Stepper:
    """`TopKTrainer.update`, `BatchTopKTrainer.update`; `autocast` as its `trainSAE` does it, on a GPU alone."""
    from dictionary_learning.trainers import batch_top_k, top_k  # pyright: ignore[reportMissingImports]

    trainers = {"topk": top_k.TopKTrainer, "batch_topk": batch_top_k.BatchTopKTrainer}
    trainer = trainers[shape.architecture](
        steps=shape.steps, activation_dim=shape.d_in, dict_size=shape.d_sae, k=shape.k, layer=0, lm_name="none",
        device=shape.device, warmup_steps=shape.warmup, threshold_start_step=min(1000, shape.steps // 2),
    )  # fmt: skip

    def step(number: int, x: Tensor) -> None:
        low = autocast and shape.on_gpu
        with torch.autocast(shape.device, dtype=torch.bfloat16, enabled=low):
            trainer.update(number, x.bfloat16() if low else x)

    def rules() -> dict[str, Reconstruct]:
        made = trainer.ae.eval()

        def by_rule(**how: bool) -> Reconstruct:
            def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
                features = made.encode(x, **how)
                return made.decode(features), features

            return reconstruct

        if shape.architecture == "topk":
            return {"": by_rule()}
        return {"": by_rule(use_threshold=True), "batch rule": by_rule(use_threshold=False)}

    return Stepper(step, rules)


def sparsify(shape: Shape, *, products: torch.dtype = torch.bfloat16, adam: bool = False) -> Stepper:
    """What `sparsify.Trainer` does to one coder, by default with signum and autocast; it has no BatchTopK.

    On a CPU its kernels fall back to `embedding_bag`.
    """
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

    coder = SparseCoder(shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k), device=shape.device)
    scale = (shape.d_sae / 2**14) ** 0.5
    if adam:
        optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / scale)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=5e-3 / scale), momentum=0.95)
        optimizer.train()
    silent = torch.zeros(shape.d_sae, dtype=torch.long, device=shape.device)

    def step(number: int, x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(shape.device, dtype=torch.bfloat16, enabled=products is torch.bfloat16):
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(shape.d_sae, dtype=torch.bool, device=shape.device)
        fired[out.latent_indices.flatten()] = True
        silent.add_(len(x)).masked_fill_(fired, 0)

    def rules() -> dict[str, Reconstruct]:
        if not isinstance(optimizer, torch.optim.Adam):
            optimizer.eval()
        coder.set_decoder_norm_to_unit_norm()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            out = coder(x)
            features = x.new_zeros(len(x), shape.d_sae)
            return out.sae_out.float(), features.scatter_(1, out.latent_indices, out.latent_acts.float())

        return {"": reconstruct}

    return Stepper(step, rules)


def llamascopium(shape: Shape, *, triton: bool = False) -> Stepper:
    """A pass of the loop of `Trainer.fit`, bfloat16 autocast as by default; `triton` is `use_triton_kernel`.

    Metrics are not computed (its `skip_metrics_calculation`), and decoder norms are searched as in its examples.
    """
    from llamascopium.initializer import Initializer, InitializerConfig  # pyright: ignore[reportMissingImports]
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # pyright: ignore[reportMissingImports]
    from llamascopium.optim import clip_grad_norm  # pyright: ignore[reportMissingImports]
    from llamascopium.trainer import Trainer, TrainerConfig  # pyright: ignore[reportMissingImports]

    config = SAEConfig(
        hook_point_in="x", hook_point_out="x", d_model=shape.d_in, expansion_factor=shape.d_sae / shape.d_in,
        act_fn="topk" if shape.architecture == "topk" else "batchtopk", top_k=shape.k, device=shape.device,
        use_triton_kernel=triton and shape.on_gpu,
    )  # fmt: skip
    if config.d_sae != shape.d_sae:
        raise ValueError(f"d_sae {shape.d_sae} is no whole multiple of a share of d_in {shape.d_in}")
    initializer = Initializer(InitializerConfig(grid_search_init_norm=True, bias_init_method="geometric_median"))
    made = initializer.initialize_parameters(SparseAutoEncoder(config))
    with tempfile.TemporaryDirectory() as folder:  # it makes one to keep checkpoints in
        settings = TrainerConfig(
            total_training_tokens=shape.steps * shape.batch, lr_warm_up_steps=shape.warmup, k_warmup_steps=0,
            skip_metrics_calculation=True, n_checkpoints=0, exp_result_path=folder,
        )  # fmt: skip
    trainer, tokens = Trainer(settings), torch.zeros(shape.batch, dtype=torch.long, device=shape.device)

    def begin(x: Tensor) -> None:
        made.set_dataset_average_activation_norm({"x": float(x.norm(dim=1).mean())})
        initializer.initialization_search(made, {"x": x, "tokens": tokens})
        trainer._initialize_trainer(made, [{"tokens": tokens, "mask": torch.ones(len(x))}])
        trainer._initialize_optimizer(made)

    def step(number: int, x: Tensor) -> None:
        if trainer.optimizer is None:
            begin(x)
        assert trainer.optimizer is not None
        assert trainer.scheduler is not None
        made.train()
        batch = made.normalize_activations({"x": x, "tokens": tokens})
        with torch.autocast(shape.device, dtype=settings.amp_dtype):
            losses = trainer._training_step(made, batch)
        losses["loss"].item()  # it shows the loss of every step
        losses["loss"].backward()
        clip_grad_norm([p for p in made.parameters() if p.grad is not None], max_norm=float("inf"))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.scheduler.step()
        trainer.cur_step += 1

    def rules() -> dict[str, Reconstruct]:
        made.eval()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            batch, scales = made.normalize_activations({"x": x}, return_scale_factor=True)
            features = made.encode(batch["x"])
            return made.decode(features) / scales["x"], features

        return {"": reconstruct}  # of BatchTopK too it selects over the batch

    return Stepper(step, rules)
