"""Proximal policy optimisation over layer maps: an agent chooses the candidates group by group, or steps back."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fedmerge.mergerec.layer_maps.candidates import LayerMap
from fedmerge.mergerec.layer_maps.searchers import Episodes, Space
from fedmerge.seeding import derive

EPISODES_AN_UPDATE = 32
HIDDEN = 64
ACTOR_RATE, CRITIC_RATE = 3e-4, 1e-3
DISCOUNT = 0.99
EPOCHS = 40
CLIP = 0.2
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 1e-4
ACTIONS_A_GROUP = 3  # an episode of more than 3G actions ends without a map


@dataclass(frozen=True, slots=True)
class Walk:
    """One episode of T actions.

    Attributes:
        states: (T, G·C) cells of the map that were chosen before each action.
        actions: (T,) int64; C is the step back.
        layer_map: the finished map; None if the agent stepped back from the first group, or took too long.
    """

    states: torch.Tensor
    actions: torch.Tensor
    layer_map: LayerMap | None


def ppo(space: Space, seed: int) -> Episodes:
    """Learn a policy over the maps; 32 episodes an update.

    State: the cells (group, candidate) chosen so far. Actions: a candidate for the next group, or *back*, which revises
    the choice of the previous group. An episode ends behind the last group with the reward of its map.

    Source: arXiv:2503.21272 and its release: two tanh layers of 64 for actor and critic, Adam at 3e-4 and 1e-3,
        discount .99, 40 epochs an update, clipping at .2, value weight .5, entropy weight 1e-4, normalised returns.
    Differs: *back* revises a choice, where it deepens the network there; *skip* is the candidate ``zero``; an episode
        has at most 3G actions; the episodes of an update are not published.
    """
    drawn = torch.Generator().manual_seed(derive(seed, "rmm", "ppo"))
    num_cells, num_actions = space.num_groups * space.num_candidates, space.num_candidates + 1
    actor, critic = _network(num_cells, num_actions, drawn), _network(num_cells, 1, drawn)
    optimizer = torch.optim.Adam(
        [{"params": actor.parameters(), "lr": ACTOR_RATE}, {"params": critic.parameters(), "lr": CRITIC_RATE}]
    )
    while True:
        walks = [walk(space, actor, drawn) for _ in range(EPISODES_AN_UPDATE)]
        rewards = yield [each.layer_map for each in walks]
        _update(actor, critic, optimizer, walks, rewards)


@torch.no_grad()
def walk(space: Space, actor: nn.Module, drawn: torch.Generator) -> Walk:
    """Draw one episode from a policy.

    Args:
        space: the maps.
        actor: (G·C,) state -> (C + 1,) logits of the actions.
        drawn: source of the draws.
    """
    states, actions, chosen = list[torch.Tensor](), list[int](), list[int]()
    failed = False
    while not failed and len(chosen) < space.num_groups and len(actions) < ACTIONS_A_GROUP * space.num_groups:
        state = torch.zeros(space.num_groups, space.num_candidates)
        state[range(len(chosen)), chosen] = 1.0
        states.append(state.flatten())
        action = int(torch.multinomial(actor(states[-1]).softmax(dim=0), 1, generator=drawn))
        actions.append(action)
        if action < space.num_candidates:
            chosen.append(action)
        elif chosen:
            chosen.pop()
        else:
            failed = True
    finished = len(chosen) == space.num_groups
    return Walk(torch.stack(states), torch.tensor(actions), tuple(chosen) if finished else None)


def _network(inputs: int, outputs: int, drawn: torch.Generator) -> nn.Sequential:
    """Make two tanh layers of 64, drawn as torch's own layers are, but from ``drawn``."""
    widths = (inputs, HIDDEN, HIDDEN, outputs)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layer = nn.Linear(width_in, width_out, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for values in (layer.weight, layer.bias):
                values.uniform_(-(width_in**-0.5), width_in**-0.5, generator=drawn)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _update(
    actor: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer, walks: list[Walk], rewards: list[float]
) -> None:
    returns = torch.cat(
        [
            reward * DISCOUNT ** torch.arange(len(each.actions)).flip(0)
            for each, reward in zip(walks, rewards, strict=True)
        ]
    )
    returns = (returns - returns.mean()) / (returns.std() + 1e-7)
    states, actions = torch.cat([each.states for each in walks]), torch.cat([each.actions for each in walks])
    with torch.no_grad():
        before = actor(states).log_softmax(dim=1).gather(1, actions[:, None]).squeeze(1)  # (T,)
        advantages = returns - critic(states).squeeze(1)
    for _ in range(EPOCHS):
        logs = actor(states).log_softmax(dim=1)  # (T, C + 1)
        ratio = (logs.gather(1, actions[:, None]).squeeze(1) - before).exp()
        gained = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        entropy = -(logs.exp() * logs).sum(dim=1).mean()
        missed = nn.functional.mse_loss(critic(states).squeeze(1), returns)
        loss = -gained.mean() + VALUE_WEIGHT * missed - ENTROPY_WEIGHT * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
