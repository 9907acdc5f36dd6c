# ruff: noqa: T201 (an example may print)

import torch
from transformers import AutoModelForCausalLM

import seodang.softlabels
from seodang.student.losses import sparse_kd_loss

store = seodang.softlabels.open("runs/library/soft-labels")
print(len(store), "sequences,", store.num_tokens, "labelled tokens,", store.estimator)

seq = store[0]
t = int(seq.labelled[1])  # the label at t: the distribution of the token after t
entries = slice(seq.offsets[t], seq.offsets[t + 1])
print(seq.ids[entries])
print(seq.weights[entries].round(3))

student = AutoModelForCausalLM.from_pretrained("runs/library/student")
tokens = torch.from_numpy(seq.token_ids).long()
hidden = student.base_model(tokens[None]).last_hidden_state[0]  # (T, H)
total = sparse_kd_loss(
    hidden,
    student.get_output_embeddings().weight,  # (V, H)
    torch.from_numpy(seq.offsets),
    torch.from_numpy(seq.ids),
    torch.from_numpy(seq.weights),
    reduction="sum",
)
total.backward()
print(f"{total.item() / len(seq.labelled):.3f} nats per labelled token")
