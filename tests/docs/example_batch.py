import rpac
from rpac.spec import load_spec

limits = rpac.Limits.of(load_spec("specs/tiny.yaml"))  # or engine.limits
batch = rpac.Batch.build(
    limits,
    q_lens=[5, 1, 16, 1],  # new tokens of each sequence, in the caller's order
    context_lens=[20, 40, 0, 7],  # tokens of each that the cache holds already
    page_tables=[[3, 9], [1, 4, 7], [2], [8]],
)
table = batch.page_indices.reshape(limits.max_num_seqs, limits.pages_per_seq)

print("order       ", batch.order)
print("kv_lens     ", batch.kv_lens)
print("cu_q_lens   ", batch.cu_q_lens)
print("distribution", batch.distribution)
print("tokens      ", batch.tokens, "of which", batch.num_tokens, "are real")
print("kind        ", batch.kind)
for row, pages in enumerate(table[:, :4]):
    print(f"page_indices, row {row}, first entries: {pages}")
