// safetensors: any bytes are opened or refused; what opens is read to its last element, written again, loaded and scored.
// An input that begins with { is a header alone and data behind a 0 byte: the length in front is then added here.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx = fuzz_context();
    static mil_model *model;
    if (!model) FUZZ_CHECK((model = mil_create(ctx, "abmil", "in_dim=4 embed_dim=3 attn_dim=2")) != NULL);
    const size_t before = fuzz_live;
    fuzz_peak = fuzz_live;
    uint8_t *bytes = fuzz_header(&data, &size, "", 0, 8);
    mil_tensors *file;
    mil_status status = mil_tensors_open_memory(ctx, data, size, size & 1 ? MIL_FILE_LIST_ONLY : 0, &file);
    fuzz_status(ctx, status);
    FUZZ_CHECK((status == MIL_OK) == (file != NULL));
    FUZZ_CHECK(fuzz_peak - before <= 64 * size + 65536);   // no allocation that the file does not justify
    if (file) {
        const int64_t count = mil_tensors_count(file);
        unsigned sum = 0;
        size_t total = 0;
        for (int64_t i = 0; i < count; i++) {
            const mil_tensor *t = mil_tensors_at(file, i);
            FUZZ_CHECK(mil_tensors_find(file, mil_tensors_name(file, i)) == i);
            if (!t->data) continue;
            const size_t n = mil_tensors_bytes(file, i);
            FUZZ_CHECK((size_t)mil_tensor_count(t) * mil_dtype_size(t->dtype) == n);
            for (size_t k = 0; k < n; k++) sum += ((const uint8_t *)t->data)[k];
            total += n;
        }
        FUZZ_CHECK(total <= size);
        for (int64_t i = 0; i < mil_tensors_meta_count(file); i++) {
            const char *key = mil_tensors_meta_key(file, i);
            FUZZ_CHECK(mil_tensors_meta(file, key) == mil_tensors_meta_value(file, i));
            sum += (unsigned)strlen(mil_tensors_meta_value(file, i));
        }
        static volatile unsigned sink;
        sink = sum;
        (void)sink;
        if (!(size & 1) && count <= 16) {                  // written again it holds the same
            mil_tensor tensor[16];
            const char *name[16];
            size_t room = 0;
            for (int64_t i = 0; i < count; i++) { tensor[i] = *mil_tensors_at(file, i); name[i] = mil_tensors_name(file, i); }
            FUZZ_CHECK(mil_tensors_write_memory(ctx, tensor, name, count, NULL, 0, NULL, &room) == MIL_OK);
            uint8_t *copy = (uint8_t *)malloc(room);
            mil_tensors *again;
            FUZZ_CHECK(copy && mil_tensors_write_memory(ctx, tensor, name, count, NULL, 0, copy, &room) == MIL_OK);
            FUZZ_CHECK(mil_tensors_open_memory(ctx, copy, room, 0, &again) == MIL_OK && mil_tensors_count(again) == count);
            for (int64_t i = 0; i < count; i++) {
                const mil_tensor *t = mil_tensors_get(again, name[i]);
                FUZZ_CHECK(t && t->dtype == tensor[i].dtype && t->rank == tensor[i].rank);
                FUZZ_CHECK(mil_tensors_bytes(file, i) == 0 || memcmp(t->data, tensor[i].data, mil_tensors_bytes(file, i)) == 0);
            }
            mil_tensors_free(again);
            free(copy);
        }
    }
    mil_tensors_free(file);
    if (status == MIL_OK) {
        mil_load_options options = mil_load_options_default();
        options.allow_missing = options.allow_extra = 1;
        options.check_finite = size >> 1 & 1;
        status = mil_load_memory(model, data, size, &options);
        fuzz_status(ctx, status);
        if (status == MIL_OK) fuzz_score(model);
    }
    FUZZ_CHECK(fuzz_live == before);
    free(bytes);
    return 0;
}
