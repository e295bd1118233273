// NPY: any bytes are opened or refused; what opens is read to its last element, written again, and scored as a bag.
// An input that begins with ' or { is a dict alone and data behind a 0 byte: the fixed header is then added here.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx = fuzz_context();
    static mil_model *model;
    static mil_scorer *scorer;
    if (!model) {
        FUZZ_CHECK((model = mil_create(ctx, "abmil", "in_dim=4 embed_dim=3 attn_dim=2")) != NULL);
        FUZZ_CHECK((scorer = mil_scorer_create(model, NULL)) != NULL);
    }
    fuzz_peak = fuzz_live;
    const size_t before = fuzz_live;
    size_t grown = 0;
    uint8_t *bytes = fuzz_header(&data, &size, "\x93NUMPY\2\0", 8, 4);
    mil_npy *npy;
    const mil_status status = mil_npy_open_memory(ctx, data, size, 0, &npy);
    fuzz_status(ctx, status);
    FUZZ_CHECK((status == MIL_OK) == (npy != NULL));
    FUZZ_CHECK(fuzz_peak - before <= 16 * size + 65536);
    if (npy) {
        const mil_tensor *t = mil_npy_tensor(npy);
        const int64_t count = mil_tensor_count(t);
        FUZZ_CHECK(count >= 0 && (size_t)count * mil_dtype_size(t->dtype) <= size);
        size_t room = 0;
        if (t->dtype != MIL_BF16) {                        // written again in C order it holds the same elements
            FUZZ_CHECK(mil_npy_write_memory(ctx, t, NULL, &room) == MIL_OK);
            uint8_t *copy = (uint8_t *)malloc(room);
            mil_npy *again;
            FUZZ_CHECK(copy && mil_npy_write_memory(ctx, t, copy, &room) == MIL_OK);
            FUZZ_CHECK(mil_npy_open_memory(ctx, copy, room, 0, &again) == MIL_OK);
            FUZZ_CHECK(mil_tensor_count(mil_npy_tensor(again)) == count && mil_npy_tensor(again)->rank == t->rank);
            mil_npy_free(again);
            free(copy);
        }
        mil_bag bag;
        memset(&bag, 0, sizeof bag);
        bag.features = *t;
        const size_t at = fuzz_live;
        const mil_status scored = mil_scorer_score(scorer, &bag);
        grown = fuzz_live - at;                            // the scorer keeps what it has grown to
        fuzz_status(ctx, scored);
        if (scored == MIL_OK) {
            mil_real logits[2];
            if (mil_scorer_count(scorer, MIL_LOGITS) == 2) fuzz_status(ctx, mil_scorer_read(scorer, MIL_LOGITS, logits, 2));
        }
    }
    mil_npy_free(npy);
    FUZZ_CHECK(fuzz_live == before + grown);
    if (grown) {
        mil_scorer_free(scorer);
        mil_model_free(model);
        model = NULL;
    }
    free(bytes);
    return 0;
}
