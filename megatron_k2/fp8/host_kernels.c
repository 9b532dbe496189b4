/* e4m3 tiles of 1 x 128 on the host: the arithmetic of tiles.py, bit for bit, in one pass over
 * memory. Compiled at first use by host_kernels.py with the machine's own C compiler; no header of
 * torch is needed. No fast-math: NaN, infinities and denormals must survive. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 128

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* To nearest, ties to even, saturating at 448; NaN becomes 0x7f. Below 2^-6 e4m3's grid is even,
 * 2^-9 apart: adding 1.5 * 2^14 leaves the multiple of 2^-9 in the lowest bits. */
static inline uint8_t encode(float value) {
    uint32_t bits = to_bits(value), sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
    uint32_t is_nan = size > 0x7f800000u;
    size = size > 0x43e00000u ? 0x43e00000u : size; /* 448 */
    uint32_t small = to_bits(from_bits(size) + 24576.0f) & 0xf;
    uint32_t large = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120u << 3);
    uint32_t code = size < 0x3c800000u ? small : large; /* 2^-6 */
    return (uint8_t)(sign | (is_nan ? 0x7f : code));
}

static inline float decode(uint8_t code) {
    uint32_t bits = ((uint32_t)(code & 0x80) << 24) | ((uint32_t)(code & 0x7f) << 20);
    float value = from_bits(bits) * 0x1p120f;
    return (code & 0x7f) == 0x7f ? NAN : value;
}

static inline float scale_of(float amax, int power_of_two) {
    if (amax == 0.0f) return 1.0f;
    float scale = amax / 448.0f;
    if (scale < 0x1p-126f) scale = 0x1p-126f;
    if (power_of_two) {
        uint32_t bits = to_bits(scale);
        scale = from_bits((bits + 0x7fffff) & 0xff800000u);
    }
    return scale;
}

static void pack_tile(const float *wide, long width, uint8_t *data, float *scale, int pow2) {
    int32_t largest = 0; /* bits of positive floats are ordered as the floats */
    for (long i = 0; i < width; i++) {
        int32_t size = (int32_t)(to_bits(wide[i]) & 0x7fffffff);
        size &= -(int32_t)(size < 0x7f800000); /* NaN and infinities set no scale */
        largest = size > largest ? size : largest;
    }
    float divisor = scale_of(from_bits((uint32_t)largest), pow2);
    for (long i = 0; i < width; i++) data[i] = encode(wide[i] / divisor);
    *scale = divisor;
}

void pack_bf16(const uint16_t *x, long rows, long columns, uint8_t *data, float *scales, int pow2) {
    long tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            float wide[TILE];
            for (long i = 0; i < width; i++) wide[i] = from_bits((uint32_t)x[at + i] << 16);
            pack_tile(wide, width, data + at, scales + row * tiles + tile, pow2);
        }
}

void pack_fp32(const float *x, long rows, long columns, uint8_t *data, float *scales, int pow2) {
    long tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            pack_tile(x + at, width, data + at, scales + row * tiles + tile, pow2);
        }
}

void unpack_bf16(const uint8_t *data, const float *scales, long rows, long columns, uint16_t *out) {
    long tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            float scale = scales[row * tiles + tile];
            for (long i = 0; i < width; i++) {
                float value = decode(data[at + i]) * scale;
                uint32_t bits = to_bits(value);
                uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
                out[at + i] = (bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : (uint16_t)rounded;
            }
        }
}

void unpack_fp32(const uint8_t *data, const float *scales, long rows, long columns, float *out) {
    long tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            float scale = scales[row * tiles + tile];
            for (long i = 0; i < width; i++) out[at + i] = decode(data[at + i]) * scale;
        }
}
