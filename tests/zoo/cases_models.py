"""Cases: small whole models of the kinds that people train: flows, processes, games, equilibria."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, mlp, regression
from .registry import Problem, case

Batch = tuple[Tensor, Tensor]


@case("normalising_flow")
def normalising_flow() -> Problem:
    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([mlp(2, 4, 4), mlp(2, 4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            log_det = x.new_zeros(len(x))
            for net in self.nets:
                a, b = x.chunk(2, dim=1)
                shift, scale = net(a).chunk(2, dim=1)
                x = torch.cat([b * scale.tanh().exp() + shift, a], dim=1)
                log_det = log_det + scale.tanh().sum(1)
            return 0.5 * x.square().sum(1) - log_det

    return Problem(Coupling(), regression(4), lambda nll, _: nll.mean())


@case("flow_through_distributions")
def flow_through_distributions() -> Problem:
    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc, self.log_scale = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> torch.distributions.Distribution:
            scale = self.log_scale(x).exp()
            return torch.distributions.Independent(
                torch.distributions.Normal(self.loc(x), scale), 1
            )

    return Problem(Density(), regression(4), lambda d, y: -d.log_prob(y).mean())


@case("gaussian_process", warns="no mean of theirs")
def gaussian_process() -> Problem:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_length = nn.Parameter(torch.randn(4))
            self.log_scale, self.log_noise = (
                nn.Parameter(torch.tensor(0.2)),
                nn.Parameter(torch.tensor(-1.0)),
            )

        def forward(self, x: Tensor) -> Tensor:
            z = x / self.log_length.exp()
            squares = (z[:, None] - z).square().sum(-1)
            noise = self.log_noise.exp() * torch.eye(len(x), dtype=x.dtype)
            return self.log_scale.exp() * torch.exp(-0.5 * squares) + noise

    def marginal(covariance: Tensor, y: Tensor) -> Tensor:
        root = torch.linalg.cholesky(covariance)
        alpha = torch.cholesky_solve(y, root)
        return 0.5 * (y * alpha).sum() / len(y) + root.diagonal().log().sum() / len(y)

    return Problem(Kernel(), regression(4, outputs=(1,)), marginal)


@case("gaussian_process_by_distribution")
def gaussian_process_by_distribution() -> Problem:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.factor = nn.Linear(4, 2), nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Any:
            covariance = self.factor @ self.factor.T + torch.eye(2, dtype=x.dtype)
            return torch.distributions.MultivariateNormal(self.mean(x), covariance)

    return Problem(Mean(), regression(4), lambda d, y: -d.log_prob(y).mean())


@case("mixture_density")
def mixture_density() -> Problem:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        logits, mean, log_scale = outputs.chunk(3, dim=1)
        z = (y[:, :1] - mean) * (-log_scale).exp()
        return -(logits.log_softmax(1) - 0.5 * z**2 - log_scale).logsumexp(1).mean()

    return Problem(mlp(4, 5, 6), regression(4), loss)


@case("variational_autoencoder", warns="which is an assumption")  # noise for six samples at most
def variational_autoencoder() -> Problem:
    class Vae(nn.Module):
        noise: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = mlp(4, 5, 4), mlp(2, 5, 4)
            self.register_buffer("noise", torch.randn(6, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
            z = mean + (0.5 * log_variance).exp() * self.noise[: len(x)]
            return self.decoder(z), mean, log_variance

    def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
        out, mean, log_variance = model(batch[0])
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(out, batch[0]) + kl

    return Problem(Vae(), regression(4), batch_loss=batch_loss)


@case("variational_autoencoder_sampling", reference="laws")
def variational_autoencoder_sampling() -> Problem:
    def batch_loss(model: nn.ModuleDict, batch: Batch) -> Tensor:
        mean, scale = model["encoder"](batch[0]).chunk(2, dim=1)
        z = torch.distributions.Normal(mean, scale.exp()).rsample()
        return F.mse_loss(model["decoder"](z), batch[0])

    model = nn.ModuleDict({"encoder": mlp(4, 5, 4), "decoder": mlp(2, 5, 4)})
    return Problem(model, regression(4), batch_loss=batch_loss)


@case("adversarial_pair")
def adversarial_pair() -> Problem:
    data = [(torch.randn(b, 2), torch.randn(b, 3)) for b in SIZES]

    def batch_loss(model: nn.ModuleDict, batch: Batch) -> Tensor:
        noise, seen = batch
        fake = model["generator"](noise)
        judge = model["judge"]
        return F.softplus(judge(fake)).mean() + F.softplus(-judge(seen)).mean()

    model = nn.ModuleDict({"generator": mlp(2, 4, 3), "judge": mlp(3, 4, 1)})
    return Problem(model, data, batch_loss=batch_loss)


@case("euler_steps")
def euler_steps() -> Problem:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = mlp(5, 6, 4)

        def forward(self, x: Tensor) -> Tensor:
            for step in range(5):
                time = torch.full_like(x[:, :1], step / 5)
                x = x + 0.2 * self.field(torch.cat([x, time], dim=1))
            return x

    return Problem(Flow(), regression(4, outputs=(4,)), nn.MSELoss())


@case("runge_kutta_steps")
def runge_kutta_steps() -> Problem:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.log_step = mlp(4, 5, 4), nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: Tensor) -> Tensor:
            h = self.log_step.exp()
            for _ in range(2):
                a = self.f(x)
                b = self.f(x + h / 2 * a)
                c = self.f(x + h / 2 * b)
                x = x + h / 6 * (a + 2 * b + 2 * c + self.f(x + h * c))
            return x

    return Problem(Flow(), regression(4, outputs=(4,)), nn.MSELoss())


@case("deep_equilibrium_unrolled")
def deep_equilibrium_unrolled() -> Problem:
    class Equilibrium(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = x.new_zeros(len(x), 3)
            for _ in range(12):
                z = torch.tanh(0.5 * self.inner(z) + self.inward(x))
            return self.head(z)

    return Problem(Equilibrium(), regression(4), nn.MSELoss())


@case("loop_until_converged")
def loop_until_converged() -> Problem:
    """The number of steps follows from the values: a branch that ``.item()`` decides."""

    class Sinkhorn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cost = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            k = self.cost(x).exp()
            for _ in range(6):
                k = k / k.sum(0, keepdim=True)
                k = k / k.sum(1, keepdim=True)
                if (k.sum(0) - len(x) / 3).abs().max().item() < 1e-14:
                    break
            return k[:, :2]

    return Problem(Sinkhorn(), regression(4), nn.MSELoss())


@case("mixture_of_experts")
def mixture_of_experts() -> Problem:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 3)
            self.experts = nn.ModuleList([mlp(4, 3, 2) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            gates, chosen = self.router(x).softmax(1).topk(2, dim=1)
            out = x.new_zeros(len(x), 2)
            for e, expert in enumerate(self.experts):
                rows, places = torch.where(chosen == e)
                if len(rows):
                    weighted = gates[rows, places, None] * expert(x[rows])
                    out = out.index_add(0, rows, weighted)
            return out

    return Problem(Experts(), regression(4), nn.MSELoss())


@case("graph_convolution")
def graph_convolution() -> Problem:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            n = len(x)
            edges = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
            links = torch.sparse_coo_tensor(
                edges, torch.ones(n, dtype=x.dtype), (n, n), check_invariants=False
            )
            h = torch.tanh(torch.sparse.mm(links, self.first(x)))
            return torch.sparse.mm(links, self.second(h))

    return Problem(Graph(), regression(4), nn.MSELoss())


@case("graph_pooling")
def graph_pooling() -> Problem:
    class Set(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi, self.rho = mlp(3, 4, 4), mlp(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.rho(self.phi(x).exp().sum(1).log())

    return Problem(Set(), regression(5, 3), nn.MSELoss())


@case("radial_basis_network")
def radial_basis_network() -> Problem:
    class Radial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres, self.gamma = (
                nn.Parameter(torch.randn(3, 4)),
                nn.Parameter(torch.tensor(0.3)),
            )
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.exp(-self.gamma * torch.cdist(x, self.centres) ** 2))

    return Problem(Radial(), regression(4), nn.MSELoss())


@case("factorisation_machine")
def factorisation_machine() -> Problem:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(5, 3), nn.Embedding(4, 3)
            self.bias = nn.Parameter(torch.zeros(()))

        def forward(self, users: Tensor, items: Tensor) -> Tensor:
            return (self.users(users) * self.items(items)).sum(1) + self.bias

    data = [((torch.randint(5, (b,)), torch.randint(4, (b,))), torch.randn(b)) for b in SIZES]
    return Problem(Factors(), data, nn.MSELoss())


@case("neural_process_of_survival", warns="no mean of theirs")
def neural_process_of_survival() -> Problem:
    """Cox's partial likelihood, whose risk sets couple the samples of a batch."""

    def loss(risk: Tensor, times: Tensor) -> Tensor:
        order = times[:, 0].argsort(descending=True)
        sorted_risk = risk[order, 0]
        return -(sorted_risk - sorted_risk.logcumsumexp(0)).mean()

    return Problem(mlp(4, 5, 1), regression(4), loss)


@case("policy_gradient")
def policy_gradient() -> Problem:
    data = [(torch.randn(b, 4), (torch.randint(3, (b,)), torch.randn(b))) for b in SIZES]

    def loss(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        actions, advantage = targets
        policy = torch.distributions.Categorical(logits=logits)
        ratio = (policy.log_prob(actions) + math.log(3)).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantage
        return -torch.minimum(ratio * advantage, clipped).mean() - 0.01 * policy.entropy().mean()

    return Problem(mlp(), data, loss)


@case("contrastive_pair_with_temperature")
def contrastive_pair_with_temperature() -> Problem:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(4, 4, 3), mlp(2, 4, 3)
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            a, b = F.normalize(self.left(left)), F.normalize(self.right(right))
            return self.temperature.exp() * a @ b.T

    data = [((torch.randn(b, 4), torch.randn(b, 2)), torch.arange(b)) for b in SIZES]
    return Problem(
        Pair(), data, lambda s, y: 0.5 * (F.cross_entropy(s, y) + F.cross_entropy(s.T, y))
    )


@case("neural_radiance_positional_encoding")
def neural_radiance_positional_encoding() -> Problem:
    class Radiance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies, self.body = nn.Parameter(torch.rand(4, 2) * 2), mlp(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            angles = x @ self.frequencies
            density, colour = self.body(torch.cat([angles.sin(), angles.cos()], 1)).chunk(2, 1)
            alpha = 1 - torch.exp(-F.softplus(density))
            return alpha * torch.cumprod(1 - alpha + 1e-10, dim=0) * colour.sigmoid()

    return Problem(Radiance(), regression(4, outputs=(1,)), nn.MSELoss())


@case("unet_with_skips")
def unet_with_skips() -> Problem:
    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.deep = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
            self.up, self.last = nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = F.silu(self.down(x))
            b = F.silu(self.deep(a))
            return self.last(torch.cat([x, self.up(torch.cat([a, b], 1))], 1))

    return Problem(Unet(), regression(1, 4, 4, outputs=(1, 4, 4)), nn.MSELoss())
