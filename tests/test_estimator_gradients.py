"""What each estimator does to the student: its gradients, per logit and in the mean.

With S the stored ids, w their weights, P = sum(w), and q the student's softmax, Q its mass on S.
The full distribution p gives q - p per logit.
"""

import numpy as np
import pytest
import torch

from seodang.student.losses import sparse_kd_loss
from tiny_store import PARAMETERS, UNBIASED, config_of, dense, labels_of, logits_of, probabilities

VOCABULARY = 60
FAR, NEAR = 2.0, 0.3  # how much the student's logits are disturbed


def loss_of(entries, hidden, head, estimator, **options):
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(entries.counts)]))
    return sparse_kd_loss(
        hidden,
        head,
        offsets,
        torch.from_numpy(entries.ids),
        torch.from_numpy(entries.weights).float(),
        residual=estimator == "residual",
        **options,
    )


def gradient_per_logit(entries, student, estimator):
    """(positions, vocabulary): that of a bias which each position has for itself."""
    n = len(student)
    rows = []
    bounds = np.concatenate([[0], np.cumsum(entries.counts)])
    for i in range(n):
        part = slice(bounds[i], bounds[i + 1])
        one = type(entries)(
            entries.counts[i : i + 1],
            entries.ids[part],
            entries.weights[part],
            entries.head_mass[i : i + 1],
            entries.entropy[i : i + 1],
        )
        bias = student[i].clone().requires_grad_()
        hidden, head = torch.zeros(1, 1), torch.zeros(VOCABULARY, 1)
        loss_of(one, hidden, head, estimator, bias=bias).backward()
        rows.append(bias.grad.double().numpy())
    return np.array(rows)


@pytest.mark.parametrize("disturbed", [FAR, NEAR])
@pytest.mark.parametrize("estimator", list(PARAMETERS))
def test_the_gradient_per_logit_is_that_of_the_table(estimator, disturbed):
    teacher = logits_of(6, VOCABULARY, 1)
    student = teacher + logits_of(6, VOCABULARY, 2, disturbed)
    q = probabilities(student)
    found = labels_of(config_of(estimator), teacher, 3)
    w = dense(found.counts, found.ids, found.weights, VOCABULARY)
    stored = dense(found.counts, found.ids, np.ones(len(found.ids)), VOCABULARY) > 0
    mass, of_student = w.sum(1, keepdims=True), (q * stored).sum(1, keepdims=True)
    if estimator == "residual":
        expected = np.where(stored, q - w, q * (1 - (1 - mass) / (1 - of_student)))
    else:
        expected = mass * q - w
    gradient = gradient_per_logit(found, student, estimator)
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def gradients(estimator, teacher, hidden, head, seed):
    """Of the mean loss, with respect to the hidden states and the head, in one vector."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss_of(labels_of(config_of(estimator), teacher, seed), hidden, head, estimator).backward()
    return torch.cat([hidden.grad.reshape(-1), head.grad.reshape(-1)]).double().numpy()


def student_of(disturbed):
    """Teacher's logits, and a student's hidden states and head whose logits are near them."""
    hidden, head = logits_of(8, 12, 5, 1.0), logits_of(VOCABULARY, 12, 6, 0.6)
    teacher = hidden @ head.T + logits_of(8, VOCABULARY, 7, disturbed)
    return teacher, hidden, head


def dense_gradient(teacher, hidden, head):
    """In float64, from the full distribution."""
    difference = probabilities(hidden @ head.T) - probabilities(teacher)
    difference /= len(hidden)
    h, w = hidden.double().numpy(), head.double().numpy()
    return np.concatenate([(difference @ w).reshape(-1), (difference.T @ h).reshape(-1)])


def bias_in_standard_errors(estimator, disturbed, repeats=800):
    teacher, hidden, head = student_of(disturbed)
    full = dense_gradient(teacher, hidden, head)
    found = np.array([gradients(estimator, teacher, hidden, head, s) for s in range(repeats)])
    error = found.std(0) / np.sqrt(repeats) + 1e-7
    return (found.mean(0) - full) / error, full


@pytest.mark.parametrize("disturbed", [FAR, NEAR])
@pytest.mark.parametrize("estimator", UNBIASED)
def test_the_mean_gradient_of_the_drawn_estimators_is_the_full_one(estimator, disturbed):
    """Within six standard errors at every one of hundreds of parameters."""
    bias, _ = bias_in_standard_errors(estimator, disturbed)
    assert np.abs(bias).max() < 6
    assert 0.7 < np.sqrt((bias**2).mean()) < 1.3  # as large as chance makes it, and no larger


@pytest.mark.parametrize("disturbed", [FAR, NEAR])
def test_the_mean_gradient_of_top_k_is_another(disturbed):
    bias, full = bias_in_standard_errors("top-k", disturbed, repeats=100)
    assert np.abs(bias).max() > 50
    teacher, hidden, head = student_of(disturbed)
    found = np.mean([gradients("top-k", teacher, hidden, head, s) for s in range(20)], 0)
    cosine = found @ full / np.linalg.norm(found) / np.linalg.norm(full)
    assert cosine < 0.99
