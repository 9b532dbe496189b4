/* A decoding step's fp32 arithmetic on the host, where calls and copies cost more than numbers: norms,
 * latents into their pages, attention over pages, routed experts. Wrapped by host_kernels.py, compiled
 * by host_library.py. A row's sums run in one order whatever else is in the step, so that its bits
 * do not depend on the batch. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 16 /* columns of a product at once: two vectors of 8 */
#define TALL 6   /* rows at once: 6 x 2 sums, 2 columns and a row fit 16 vector registers */
#define HEADS 4
#define PIECE 96 /* rows that one thread takes at once */

typedef float vec __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE float exponential(float x) { /* Cephes' expf, within 2 units of the last place; 0 below -87 */
    float at = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x, n = rintf(at * 1.44269504f);
    float r = (at - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float two;
    memcpy(&two, &power, 4);
    return x < -87.0f ? 0.0f : y * two;
}

/* out[r][:] = rows[r] . panel, whose rows of PANEL columns lie ``step`` apart. */
INLINE void product(const int count, const float *const *rows, const float *panel, long step,
                    long depth, float out[TALL][PANEL]) {
    vec sums[TALL][2] = {{{0}}};
    for (long k = 0; k < depth; k++) {
        vec left = load(panel + k * step), right = load(panel + k * step + 8);
#pragma GCC unroll 6
        for (int r = 0; r < count; r++) {
            sums[r][0] += rows[r][k] * left;
            sums[r][1] += rows[r][k] * right;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < count; r++) memcpy(out[r], sums[r], sizeof sums[r]);
}

static void products(int count, const float *const *rows, const float *panel, long step, long depth,
                     float out[TALL][PANEL]) {
    switch (count) {
    case 1: product(1, rows, panel, step, depth, out); break;
    case 2: product(2, rows, panel, step, depth, out); break;
    case 3: product(3, rows, panel, step, depth, out); break;
    case 4: product(4, rows, panel, step, depth, out); break;
    case 5: product(5, rows, panel, step, depth, out); break;
    default: product(6, rows, panel, step, depth, out);
    }
}

/* out = x . weight, in panels; rows of x lie ``stride`` apart, those of out are dense. */
void linear(const float *x, long rows, long stride, long width, const float *panels, long columns,
            float *out, long threads) {
#pragma omp parallel for num_threads((int)threads) collapse(2)
    for (long piece = 0; piece < rows; piece += PIECE)
        for (long column = 0; column < columns; column += PANEL) {
            const float *panel = panels + column * width, *from[TALL];
            long end = piece + PIECE < rows ? piece + PIECE : rows;
            for (long at = piece; at < end; at += TALL) {
                float sums[TALL][PANEL];
                int tall = end - at < TALL ? (int)(end - at) : TALL;
                for (int r = 0; r < tall; r++) from[r] = x + (at + r) * stride;
                products(tall, from, panel, PANEL, width, sums);
                for (int r = 0; r < tall; r++)
                    memcpy(out + (at + r) * columns + column, sums[r], sizeof sums[r]);
            }
        }
}

/* Root mean square norm of rows ``stride`` apart into dense rows. */
void rms_norm(const float *x, long rows, long width, long stride, const float *weight, float eps,
              float *out) {
    for (long row = 0; row < rows; row++, x += stride, out += width) {
        float sum = 0;
        for (long i = 0; i < width; i++) sum += x[i] * x[i];
        float scale = 1 / sqrtf(sum / width + eps);
        for (long i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
    }
}

INLINE void turn(float *x, const float *turns, long rope) { /* neighbours are a complex number */
    for (long i = 0; i < rope; i += 2) {
        float a = x[i], b = x[i + 1];
        x[i] = a * turns[i] - b * turns[i + 1];
        x[i + 1] = a * turns[i + 1] + b * turns[i];
    }
}

/* Write each row's normed latent and turned key into its page; turn the queries' last part in place.
 * latents: rows ``stride`` apart, rank + rope numbers; queries: [rows, heads, width]; turns of each
 * position: rope numbers. weight may be NULL: no norm. */
void place(const float *latents, long rows, long stride, long rank, long rope, const float *weight,
           float eps, const float *turns, const int64_t *positions, const int64_t *places,
           float *pages, float *queries, long heads, long width) {
    for (long row = 0; row < rows; row++, latents += stride) {
        const float *angle = turns + positions[row] * rope;
        float *page = pages + places[row] * (rank + rope);
        if (weight) rms_norm(latents, 1, rank, 0, weight, eps, page);
        else memcpy(page, latents, rank * sizeof(float));
        memcpy(page + rank, latents + rank, rope * sizeof(float));
        turn(page + rank, angle, rope);
        for (long head = 0; head < heads; head++)
            turn(queries + (row * heads + head) * width + width - rope, angle, rope);
    }
}

/* scores[h][t] = scale * query_h . page_t, then softmax over t. */
INLINE void weigh(const int heads, const float *query, const float *pages, const int64_t *places,
                  long tokens, long width, float scale, float *scores, long length) {
    for (long t = 0; t < tokens; t++) {
        const float *page = pages + places[t] * width;
        vec sums[HEADS] = {{0}};
        long i = 0;
        for (; i + 8 <= width; i += 8) {
            vec key = load(page + i);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sums[h] += load(query + h * width + i) * key;
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            vec s = sums[h];
            float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
            for (long j = i; j < width; j++) sum += query[h * width + j] * page[j];
            scores[h * length + t] = scale * sum;
        }
    }
    for (int h = 0; h < heads; h++) {
        float *row = scores + h * length, largest = row[0], sum = 0;
        for (long t = 1; t < tokens; t++) largest = row[t] > largest ? row[t] : largest;
        for (long t = 0; t < tokens; t++) row[t] = exponential(row[t] - largest);
        for (long t = 0; t < tokens; t++) sum += row[t];
        for (long t = 0; t < tokens; t++) row[t] /= sum;
    }
}

INLINE void mix(const int heads, const float *scores, long length, const float *pages,
                const int64_t *places, long tokens, long width, long rank, float *out) {
    for (long column = 0; column < rank; column += PANEL) {
        float sums[HEADS][PANEL] = {{0}};
        long wide = rank - column < PANEL ? rank - column : PANEL;
        if (wide == PANEL) {
            vec both[HEADS][2] = {{{0}}};
            for (long t = 0; t < tokens; t++) {
                const float *page = pages + places[t] * width + column;
                vec left = load(page), right = load(page + 8);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) {
                    both[h][0] += scores[h * length + t] * left;
                    both[h][1] += scores[h * length + t] * right;
                }
            }
            memcpy(sums, both, sizeof both);
        } else
            for (long t = 0; t < tokens; t++)
                for (int h = 0; h < heads; h++)
                    for (long i = 0; i < wide; i++)
                        sums[h][i] += scores[h * length + t] * pages[places[t] * width + column + i];
        for (int h = 0; h < heads; h++)
            memcpy(out + h * rank + column, sums[h], wide * sizeof(float));
    }
}

/* Attend one query in the latent's space a sequence: queries [sequences, heads, width], pages'
 * rows of each sequence places [sequences, length], of which ends[s] count; scores is scratch
 * [sequences, heads, length]; out [sequences, heads, rank]. */
void attend(const float *queries, long sequences, long heads, long width, long rank,
            const float *pages, const int64_t *places, const int64_t *ends, long length, float scale,
            float *scores, float *out, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (long s = 0; s < sequences; s++) {
        const int64_t *where = places + s * length;
        for (long head = 0; head < heads;) {
            const float *query = queries + (s * heads + head) * width;
            float *score = scores + (s * heads + head) * length;
            float *mixed = out + (s * heads + head) * rank;
            if (heads - head >= HEADS) {
                weigh(HEADS, query, pages, where, ends[s], width, scale, score, length);
                mix(HEADS, score, length, pages, where, ends[s], width, rank, mixed);
                head += HEADS;
            } else {
                weigh(1, query, pages, where, ends[s], width, scale, score, length);
                mix(1, score, length, pages, where, ends[s], width, rank, mixed);
                head++;
            }
        }
    }
}

/* One expert's rows: gate and up panels lie in turns; activated [rows, padded ffn] is dense. */
static void expert(const float *x, long hidden, const int64_t *slots, long count, long topk,
                   const float *probs, const float *fc1, long ffn_panels, long ffn,
                   const float *fc2, long hidden_panels, float *activated, float *parts) {
    const float *rows[TALL];
    float gate[TALL][PANEL], up[TALL][PANEL];
    long padded = ffn_panels * PANEL;
    for (long panel = 0; panel < ffn_panels; panel++, fc1 += 2 * hidden * PANEL)
        for (long at = 0; at < count; at += TALL) {
            int tall = count - at < TALL ? (int)(count - at) : TALL;
            for (int r = 0; r < tall; r++) rows[r] = x + slots[at + r] / topk * hidden;
            products(tall, rows, fc1, PANEL, hidden, gate);
            products(tall, rows, fc1 + hidden * PANEL, PANEL, hidden, up);
            for (int r = 0; r < tall; r++) {
                float *to = activated + (at + r) * padded + panel * PANEL, prob = probs[slots[at + r]];
                for (int i = 0; i < PANEL; i++)
                    to[i] = gate[r][i] / (1 + exponential(-gate[r][i])) * up[r][i] * prob;
            }
        }
    for (long panel = 0; panel < hidden_panels; panel++, fc2 += ffn * PANEL) {
        long left = hidden - panel * PANEL, wide = left < PANEL ? left : PANEL;
        for (long at = 0; at < count; at += TALL) {
            int tall = count - at < TALL ? (int)(count - at) : TALL;
            for (int r = 0; r < tall; r++) rows[r] = activated + (at + r) * padded;
            products(tall, rows, fc2, PANEL, ffn, gate);
            for (int r = 0; r < tall; r++)
                memcpy(parts + slots[at + r] * hidden + panel * PANEL, gate[r], wide * sizeof(float));
        }
    }
}

/* Routed experts: x [rows, hidden], chosen and probs [rows, topk], global indices of which first to
 * first + local are here. Scratch: order and starts of rows x topk and local + 1 numbers, activated
 * [rows x topk, padded ffn], parts [rows x topk, hidden]. out [rows, hidden] is their sum, best first. */
void experts(const float *x, long rows, long hidden, const int64_t *chosen, const float *probs,
             long topk, long first, long local, const float *fc1, const float *fc2, long ffn,
             int64_t *order, int64_t *starts, float *activated, float *parts, float *out,
             long threads) {
    long ffn_panels = (ffn + PANEL - 1) / PANEL, hidden_panels = (hidden + PANEL - 1) / PANEL;
    memset(starts, 0, (local + 1) * sizeof *starts);
    for (long slot = 0; slot < rows * topk; slot++) {
        long here = chosen[slot] - first;
        if (here >= 0 && here < local) starts[here + 1]++;
    }
    for (long here = 0; here < local; here++) starts[here + 1] += starts[here];
    for (long slot = 0; slot < rows * topk; slot++) { /* starts[e] becomes where e's rows end */
        long here = chosen[slot] - first;
        if (here >= 0 && here < local) order[starts[here]++] = slot;
    }
    long most = 1;
    for (long here = 0; here < local; here++) {
        long count = starts[here] - (here ? starts[here - 1] : 0);
        most = count > most ? count : most;
    }
    long pieces = (most + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads((int)threads) schedule(dynamic) collapse(2)
    for (long here = 0; here < local; here++)
        for (long piece = 0; piece < pieces; piece++) {
            long begin = (here ? starts[here - 1] : 0) + piece * PIECE, count = starts[here] - begin;
            if (count <= 0) continue;
            if (count > PIECE) count = PIECE;
            expert(x, hidden, order + begin, count, topk, probs,
                   fc1 + here * 2 * ffn_panels * hidden * PANEL, ffn_panels, ffn,
                   fc2 + here * hidden_panels * ffn * PANEL, hidden_panels,
                   activated + begin * ffn_panels * PANEL, parts);
        }
#pragma omp parallel for num_threads((int)threads)
    for (long row = 0; row < rows; row++) {
        float *to = out + row * hidden;
        memset(to, 0, hidden * sizeof *to);
        for (long slot = row * topk; slot < (row + 1) * topk; slot++) {
            if (chosen[slot] < first || chosen[slot] >= first + local) continue;
            const float *from = parts + slot * hidden;
            for (long i = 0; i < hidden; i++) to[i] += from[i];
        }
    }
}
