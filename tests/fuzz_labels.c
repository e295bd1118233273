// Tables of labels as the tool reads them: any bytes give a table or one sentence. Every field is then read, every column
// looked for, and numbers are taken from text.
#include "fuzz_tool.h"
#include "../tools/table.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx = fuzz_context();
    const char *path = fuzz_file(data, size);
    if (setjmp(fuzz_back) == 0) {
        table t = table_open(ctx, path);
        size_t sum = 0;
        FUZZ_CHECK(t.rows > 0 && t.columns > 0);
        for (int64_t r = 0; r < t.rows; r++) {
            int64_t n;
            double x;
            FUZZ_CHECK(t.line[r] > 0 && (r == 0 || t.line[r] > t.line[r - 1]));
            for (int64_t c = 0; c < t.columns; c++) {
                const size_t length = strlen(t.row[r][c]);
                FUZZ_CHECK(t.row[r][c] >= t.bytes && t.row[r][c] + length <= t.bytes + size);
                sum += length + (size_t)parse_int(t.row[r][c], &n) + (size_t)parse_real(t.row[r][c], &x);
            }
        }
        FUZZ_CHECK(sum <= 3 * size + 2 * (size_t)(t.rows * t.columns));
        FUZZ_CHECK(table_column(&t, "bag|slide|slide_id") < t.columns && table_column(&t, "label") < t.columns);
        table_free(&t);
        FUZZ_CHECK(fuzz_pieces.next == &fuzz_pieces);
    }
    fuzz_release_all();
    return 0;
}
