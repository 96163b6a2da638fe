"""Drop-in functions with the call signatures of other packages, over an `rpac.Engine`; docs/adapters.md.

    from rpac.adapters import tpu_inference

    attention = tpu_inference.ragged_paged_attention(engine)

    tpu_inference   tpu-inference (vLLM on TPU)   install; ragged_paged_attention, ragged_paged_attention_hd64,
                                                  batched_ragged_paged_attention, mla_ragged_paged_attention
    sglang_jax      sglang-jax                    install; ragged_paged_attention, ragged_paged_attention_v3
    tokamax         tokamax                       ragged_paged_attention
    ejkernel        ejkernel (EasyDeL)            ragged_page_attention_v3, ragged_page_attention_v3_kernel

None imports the package that it stands in for. What a bundle does not have is refused by name, never ignored.
"""
