// A picture of RGBA bytes, written as PNG: 8 bits, filter 0, deflate with fixed codes and runs of equal pixels only. Heatmaps
// are squares of one colour, so that this alone makes them small.
#ifndef TOOL_PICTURE_H
#define TOOL_PICTURE_H
#include "text.h"

typedef struct picture { int64_t width, height; unsigned char *rgba; } picture;

TOOL_FN picture picture_make(int64_t width, int64_t height)
{
    picture p = { width, height, NULL };
    if (width < 1 || height < 1 || width > 65535 || height > 65535)
        tool_fail("a picture of %lld x %lld pixels is out of range", (long long)width, (long long)height);
    p.rgba = TOOL_NEW(unsigned char, width * height * 4);
    return p;
}

TOOL_FN void picture_free(picture *p)
{
    free(p->rgba);
    memset(p, 0, sizeof *p);
}

// Fills [x0, x1) x [y0, y1), cut at the borders. colour: 0xRRGGBBAA.
TOOL_FN void picture_box(picture *p, int64_t x0, int64_t y0, int64_t x1, int64_t y1, uint32_t colour)
{
    for (int64_t y = y0 < 0 ? 0 : y0; y < y1 && y < p->height; y++)
        for (int64_t x = x0 < 0 ? 0 : x0; x < x1 && x < p->width; x++)
            for (int k = 0; k < 4; k++) p->rgba[(y * p->width + x) * 4 + k] = (unsigned char)(colour >> (24 - 8 * k));
}

// ---- deflate ----
typedef struct bit_writer { text *out; uint64_t bits; int count; } bit_writer;

TOOL_FN void bits_put(bit_writer *w, uint32_t value, int count)                    // lowest bit first
{
    w->bits |= (uint64_t)value << w->count;
    for (w->count += count; w->count >= 8; w->count -= 8, w->bits >>= 8) {
        const char byte = (char)(w->bits & 255);
        text_put(w->out, &byte, 1);
    }
}

TOOL_FN void bits_put_code(bit_writer *w, uint32_t code, int count)                // Huffman codes: highest bit first
{
    uint32_t reversed = 0;
    for (int k = 0; k < count; k++) reversed |= (code >> k & 1) << (count - 1 - k);
    bits_put(w, reversed, count);
}

TOOL_FN void bits_put_symbol(bit_writer *w, int symbol)                            // the fixed code, RFC 1951 section 3.2.6
{
    if (symbol < 144) bits_put_code(w, (uint32_t)(0x30 + symbol), 8);
    else if (symbol < 256) bits_put_code(w, (uint32_t)(0x190 + symbol - 144), 9);
    else if (symbol < 280) bits_put_code(w, (uint32_t)(symbol - 256), 7);
    else bits_put_code(w, (uint32_t)(0xc0 + symbol - 280), 8);
}

// length bytes (3..258) equal to those `distance` (4: the pixel before, or a multiple of a row) back.
TOOL_FN void bits_put_copy(bit_writer *w, int length, int distance)
{
    static const int base[] = { 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258 };
    static const int extra[] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0 };
    int k = 28, d = 0, start = 1, bits = 0;
    while (base[k] > length) k--;
    bits_put_symbol(w, 257 + k);
    bits_put(w, (uint32_t)(length - base[k]), extra[k]);
    while (distance >= start + (1 << bits)) {              // distance codes: 4 of one value, then two of each power
        start += 1 << bits;
        bits = ++d < 2 ? 0 : d / 2 - 1;
    }
    bits_put_code(w, (uint32_t)d, 5);
    bits_put(w, (uint32_t)(distance - start), bits);
}

TOOL_FN void deflate(text *out, const unsigned char *data, size_t size, size_t row)
{
    bit_writer w = { out, 0, 0 };
    uint32_t a = 1, b = 0;
    text_put(out, "\x78\x01", 2);
    bits_put(&w, 1, 1);                                    // the last block
    bits_put(&w, 1, 2);                                    // fixed codes
    for (size_t i = 0; i < size;) {
        const size_t distances[2] = { row <= 32768 ? row : 4, 4 };
        size_t best = 0, from = 4;
        for (int k = 0; k < 2; k++) {
            const size_t d = distances[k];
            size_t n = 0;
            if (i < d) continue;
            while (n < 258 && i + n < size && data[i + n] == data[i + n - d]) n++;
            if (n > best) { best = n; from = d; }
        }
        if (best >= 3) {
            bits_put_copy(&w, (int)best, (int)from);
            i += best;
        } else {
            bits_put_symbol(&w, data[i++]);
        }
    }
    bits_put_symbol(&w, 256);
    if (w.count) bits_put(&w, 0, 8 - w.count);
    for (size_t i = 0; i < size; i++) a = (a + data[i]) % 65521, b = (b + a) % 65521;        // Adler-32
    const char sum[4] = { (char)(b >> 8), (char)b, (char)(a >> 8), (char)a };
    text_put(out, sum, 4);
}

// ---- PNG ----
TOOL_FN void png_chunk(text *out, const char *type, const char *data, size_t size)
{
    const unsigned char head[4] = { (unsigned char)(size >> 24), (unsigned char)(size >> 16), (unsigned char)(size >> 8), (unsigned char)size };
    uint32_t crc = 0xffffffffu;
    text_put(out, (const char *)head, 4);
    const size_t start = out->size;
    text_put(out, type, 4);
    if (size) text_put(out, data, size);
    for (size_t i = start; i < out->size; i++) {
        crc ^= (unsigned char)out->data[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    crc = ~crc;
    const unsigned char tail[4] = { (unsigned char)(crc >> 24), (unsigned char)(crc >> 16), (unsigned char)(crc >> 8), (unsigned char)crc };
    text_put(out, (const char *)tail, 4);
}

TOOL_FN void picture_write(mil_context *ctx, const char *path, const picture *p)
{
    const size_t row = (size_t)p->width * 4 + 1;
    const unsigned w = (unsigned)p->width, h = (unsigned)p->height;
    const unsigned char head[13] = { (unsigned char)(w >> 24), (unsigned char)(w >> 16), (unsigned char)(w >> 8), (unsigned char)w,
        (unsigned char)(h >> 24), (unsigned char)(h >> 16), (unsigned char)(h >> 8), (unsigned char)h, 8, 6, 0, 0, 0 };
    unsigned char *raw = TOOL_NEW(unsigned char, row * (size_t)p->height);
    text packed = { NULL, 0, 0 }, out = { NULL, 0, 0 };
    for (int64_t y = 0; y < p->height; y++) memcpy(raw + (size_t)y * row + 1, p->rgba + y * p->width * 4, (size_t)p->width * 4);
    deflate(&packed, raw, row * (size_t)p->height, row);
    text_put(&out, "\x89PNG\r\n\x1a\n", 8);
    png_chunk(&out, "IHDR", (const char *)head, sizeof head);
    png_chunk(&out, "IDAT", packed.data, packed.size);
    png_chunk(&out, "IEND", NULL, 0);
    file_write(ctx, path, &out);
    text_free(&packed);
    text_free(&out);
    free(raw);
}

// ---- colour maps: t in 0..1 -> 0xRRGGBBAA ----
TOOL_FN uint32_t colour_mix(const unsigned char (*stops)[3], int count, double t)
{
    uint32_t colour = 255;
    if (!(t > 0)) t = 0;                                   // NaN too
    if (t > 1) t = 1;
    const double x = t * (count - 1);
    const int k = x >= count - 1 ? count - 2 : (int)x;
    for (int c = 0; c < 3; c++)
        colour |= (uint32_t)(stops[k][c] + (x - k) * (stops[k + 1][c] - stops[k][c]) + 0.5) << (24 - 8 * c);
    return colour;
}

// Low to high: dark violet, red, yellow ("inferno").
TOOL_FN uint32_t colour_sequential(double t)
{
    static const unsigned char stops[][3] = { { 0, 0, 4 }, { 40, 11, 84 }, { 101, 21, 110 }, { 159, 42, 99 }, { 212, 72, 66 },
        { 245, 125, 21 }, { 250, 193, 39 }, { 252, 255, 164 } };
    return colour_mix(stops, 8, t);
}

// Against, 0.5 neutral, for: blue, white, red.
TOOL_FN uint32_t colour_diverging(double t)
{
    static const unsigned char stops[][3] = { { 33, 102, 172 }, { 103, 169, 207 }, { 209, 229, 240 }, { 247, 247, 247 },
        { 253, 219, 199 }, { 239, 138, 98 }, { 178, 24, 43 } };
    return colour_mix(stops, 7, t);
}
#endif
