/* e4m3 tiles on the host in one pass over memory: of 1 x 128 with the arithmetic of tiles.py, of
 * 128 x 128 with that of checkpoint/fp8_blocks.py, both bit for bit. Compiled at first use by
 * host_kernels.py with the machine's own C compiler; no header of torch or Python is needed. No
 * fast-math: NaN, infinities and denormals must survive. */
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

/* The number times 2^-120, exact: sign, exponent and mantissa in fp32's places. */
static inline float decode_below(uint8_t code) {
    return from_bits(((uint32_t)(code & 0x80) << 24) | ((uint32_t)(code & 0x7f) << 20));
}

static inline float decode(uint8_t code) {
    float value = decode_below(code) * 0x1p120f;
    return (code & 0x7f) == 0x7f ? NAN : value;
}

static inline uint16_t round_to_bf16(float value) { /* no NaN */
    uint32_t bits = to_bits(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t to_bf16(float value) {
    return (to_bits(value) & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : round_to_bf16(value);
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

/* The same for numbers from 0 to 448, which take one sum to round: its last place is the grid's. */
static inline int32_t encode_positive(float value) {
    int32_t grid = (int32_t)(to_bits(value) & 0x7f800000);
    grid = grid < 0x3c800000 ? 0x3c800000 : grid; /* 2^-6: below it the grid is even */
    float addend = from_bits((uint32_t)grid + 0x0a400000u); /* 1.5 * 2^20 times the power of two */
    int32_t sum = (int32_t)to_bits(value + addend);
    return sum - grid + (grid >> 20) - (0x0a400000 + 0x3c8);
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

#ifdef FP_FAST_FMAF
/* x / divisor as a division rounds it: the product with the rounded inverse, corrected by its exact
 * remainder (Markstein 1990). True of every bf16 x and fp32 divisor while no remainder is denormal;
 * the test goes through all mantissas of x and of a tile's scale. */
static inline float quotient(float x, float divisor, float inverse) {
    float near = x * inverse;
    return fmaf(fmaf(-near, divisor, x), inverse, near);
}

/* A whole tile, all in vectors; 0 where it holds NaN or infinities, or remainders would be denormal. */
static int pack_whole(const uint16_t *x, uint8_t *data, float *scale, int pow2) {
    uint16_t sizes[TILE];
    int32_t codes[TILE];
    int16_t largest = 0;
    for (long i = 0; i < TILE; i++) {
        sizes[i] = x[i] & 0x7fff;
        largest = (int16_t)sizes[i] > largest ? (int16_t)sizes[i] : largest;
    }
    float divisor = scale_of(from_bits((uint32_t)largest << 16), pow2), inverse = 1.0f / divisor;
    if (largest >= 0x7f80 || divisor < 0x1p-60f) return 0;
    for (long i = 0; i < TILE; i++)
        codes[i] = encode_positive(quotient(from_bits((uint32_t)sizes[i] << 16), divisor, inverse));
    for (long i = 0; i < TILE; i++) data[i] = (uint8_t)(codes[i] | (x[i] >> 8 & 0x80));
    *scale = divisor;
    return 1;
}
#else
static int pack_whole(const uint16_t *x, uint8_t *data, float *scale, int pow2) { return 0; }
#endif

void pack_bf16(const uint16_t *x, long rows, long columns, uint8_t *data, float *scales, int pow2) {
    long tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            float wide[TILE], *scale = scales + row * tiles + tile;
            if (width == TILE && pack_whole(x + at, data + at, scale, pow2)) continue;
            for (long i = 0; i < width; i++) wide[i] = from_bits((uint32_t)x[at + i] << 16);
            pack_tile(wide, width, data + at, scale, pow2);
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
            for (long i = 0; i < width; i++) out[at + i] = to_bf16(decode(data[at + i]) * scale);
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

/* To FP8 and back in one pass: batches of matrices [height, columns] in tiles of tall x wide (1 x 128,
 * 128 x 1 or 128 x 128) that begin at each matrix's first row, with power-of-two scales. */
static inline float round_to_e4m3(float value) { /* decode(encode(value)) in lanes of 32 bits */
    uint32_t bits = to_bits(value), sign = bits & 0x80000000u, size = bits & 0x7fffffff;
    uint32_t is_nan = size > 0x7f800000u;
    size = size > 0x43e00000u ? 0x43e00000u : size; /* 448 */
    uint32_t small = to_bits((from_bits(size) + 24576.0f) - 24576.0f);
    uint32_t large = (size + 0x7ffff + ((size >> 20) & 1)) & 0xfff00000u;
    uint32_t found = size < 0x3c800000u ? small : large; /* 2^-6 */
    return from_bits(is_nan ? 0x7fc00000u : sign | found);
}

static inline void snap_stripe(float *tile, long rows, long width, int by_column) {
    float scales[TILE], inverses[TILE];
    int32_t largest[TILE] = {0}, most = 0;
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < TILE; i++) {
            int32_t size = (int32_t)(to_bits(tile[row * TILE + i]) & 0x7fffffff);
            size &= -(int32_t)(size < 0x7f800000);
            largest[i] = size > largest[i] ? size : largest[i];
        }
    for (long i = 0; i < TILE; i++) most = largest[i] > most ? largest[i] : most;
    if (by_column)
        for (long i = 0; i < width; i++) scales[i] = scale_of(from_bits((uint32_t)largest[i]), 1);
    else {
        float scale = scale_of(from_bits((uint32_t)most), 1);
        for (long i = 0; i < width; i++) scales[i] = scale;
    }
    for (long i = width; i < TILE; i++) scales[i] = 1.0f;
    for (long i = 0; i < TILE; i++) inverses[i] = 1.0f / scales[i]; /* exact, as its product is */
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < TILE; i++)
            tile[row * TILE + i] = round_to_e4m3(tile[row * TILE + i] * inverses[i]) * scales[i];
}

#define SNAP(NAME, TYPE, WIDEN, NARROW)                                                            \
    void NAME(const TYPE *x, long batches, long height, long columns, long tall, long wide,        \
              TYPE *out) {                                                                         \
        long stripes = (height + tall - 1) / tall;                                                 \
        _Pragma("omp parallel for") for (long at = 0; at < batches * stripes; at++) {              \
            float tile[TILE * TILE];                                                               \
            long first = at % stripes * tall, left = height - first;                               \
            long rows = left < tall ? left : tall, begin = (at / stripes * height + first);        \
            for (long column = 0; column < columns; column += TILE) {                              \
                long width = columns - column < TILE ? columns - column : TILE;                    \
                if (width < TILE) memset(tile, 0, sizeof(float) * TILE * rows);                    \
                for (long row = 0; row < rows; row++)                                              \
                    for (long i = 0; i < width; i++)                                               \
                        tile[row * TILE + i] = WIDEN(x[(begin + row) * columns + column + i]);     \
                snap_stripe(tile, rows, width, wide == 1);                                         \
                for (long row = 0; row < rows; row++)                                              \
                    for (long i = 0; i < width; i++)                                               \
                        out[(begin + row) * columns + column + i] = NARROW(tile[row * TILE + i]);  \
            }                                                                                      \
        }                                                                                          \
    }
#define FROM_BF16(bits) from_bits((uint32_t)(bits) << 16)
#define SAME(value) (value)
SNAP(snap_bf16, uint16_t, FROM_BF16, to_bf16)
SNAP(snap_fp32, float, SAME, SAME)

/* Tiles of 128 x 128, one row of scales for 128 rows. Both return 1 if a number is not finite, and
 * what they wrote is then of no use. One thread: each worker of a conversion has a core. */
int unpack_blocks(const uint8_t *data, const float *scales, long rows, long columns, uint16_t *out) {
    long tiles = (columns + TILE - 1) / TILE;
    uint8_t largest = 0;
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            const uint8_t *from = data + row * columns + tile * TILE;
            uint16_t *restrict to = out + row * columns + tile * TILE;
            long left = columns - tile * TILE, width = left < TILE ? left : TILE;
            float scale = scales[row / TILE * tiles + tile], lifted = scale * 0x1p120f;
            for (long i = 0; i < width; i++) {
                uint8_t size = from[i] & 0x7f;
                largest = size > largest ? size : largest;
            }
            if (isfinite(lifted)) /* one rounding either way: the first product is exact */
                for (long i = 0; i < width; i++) to[i] = round_to_bf16(decode_below(from[i]) * lifted);
            else
                for (long i = 0; i < width; i++)
                    to[i] = round_to_bf16(decode_below(from[i]) * 0x1p120f * scale);
        }
    return largest == 0x7f;
}

/* 2 is added if a quotient is above 464, half a step over 448: more than rounding is lost. */
int pack_blocks(const uint16_t *x, const float *scales, long rows, long columns, uint8_t *data) {
    long tiles = (columns + TILE - 1) / TILE;
    int bad = 0;
    uint32_t largest = 0;
    for (long row = 0; row < rows; row++)
        for (long tile = 0; tile < tiles; tile++) {
            long at = row * columns + tile * TILE, left = columns - tile * TILE;
            long width = left < TILE ? left : TILE;
            float scale = scales[row / TILE * tiles + tile];
            int32_t wrong = 0;
            uint32_t most = 0;
            for (long i = 0; i < width; i++) {
                uint32_t bits = (uint32_t)x[at + i] << 16;
                wrong |= (bits & 0x7f800000u) == 0x7f800000u;
                float quotient = from_bits(bits) / scale;
                uint32_t size = to_bits(quotient) & 0x7fffffff;
                most = size > most ? size : most;
                data[at + i] = encode(quotient);
            }
            bad |= wrong;
            largest = most > largest ? most : largest;
        }
    return bad | (largest > 0x43e80000u) << 1; /* 464 */
}
