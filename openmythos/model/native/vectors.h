/* Vectors of eight numbers, and numbers of three kinds that become them. */

#ifndef OPENMYTHOS_VECTORS
#define OPENMYTHOS_VECTORS

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8

typedef float wide __attribute__((vector_size(32)));
typedef float wide_anywhere __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(32)));
typedef int32_t whole_four __attribute__((vector_size(16)));
typedef float four __attribute__((vector_size(16), may_alias));
typedef float four_anywhere __attribute__((vector_size(16), aligned(4), may_alias));
typedef int8_t bytes_anywhere __attribute__((vector_size(8), aligned(1), may_alias));
typedef uint16_t bf16;  /* the upper half of a float */
typedef uint16_t halves_anywhere __attribute__((vector_size(16), aligned(2), may_alias));

/* What numbers are. Beside int8 matrices, all else of a layer is fp32. */
enum { FP32, INT8, BF16 };

#ifdef __clang__
#define MIX(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define MIX(x, y, ...) __builtin_shuffle(x, y, (whole_four){__VA_ARGS__})
#endif

INLINE wide load(const float *x) { return *(const wide_anywhere *)x; }
INLINE void store(float *x, wide v) { *(wide_anywhere *)x = v; }
INLINE wide all(float x) { return (wide){x, x, x, x, x, x, x, x}; }
INLINE wide widen(const int8_t *x) {
#ifdef __AVX2__  /* what gcc makes of the line below takes eight times as long */
    __m128i bytes = _mm_loadl_epi64((const __m128i *)x);
    return (wide)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    return __builtin_convertvector(*(const bytes_anywhere *)x, wide);
#endif
}
INLINE wide widen_bf16(const bf16 *x) {
#ifdef __AVX2__
    __m128i halves = _mm_loadu_si128((const __m128i *)x);
    return (wide)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    return (wide)(__builtin_convertvector(*(const halves_anywhere *)x, whole) << 16);
#endif
}
/* The nearest bf16, of two as near the even one; NaN stays NaN. */
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (x != x) return (bf16)(bits >> 16 | 64);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Numbers of a kind that lie at x. */
INLINE int64_t bytes_of(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }
INLINE const void *at(const void *x, int64_t i, int64_t kind) {
    return (const char *)x + i * bytes_of(kind);
}
INLINE wide wide_at(const void *x, int64_t i, int64_t kind) {
    if (kind == INT8) return widen((const int8_t *)x + i);
    return kind == BF16 ? widen_bf16((const bf16 *)x + i) : load((const float *)x + i);
}
/* One number, of FP32 or BF16. */
INLINE float one_at(const void *x, int64_t i, int64_t kind) {
    if (kind != BF16) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const bf16 *)x)[i] << 16;
    float found;
    memcpy(&found, &bits, sizeof(found));
    return found;
}
/* z + x y, rounded once where the processor can. Compilers choose by themselves where they fuse,
   and not alike in every copy of a loop, so they are told not to, and this says where. */
INLINE wide fuse(wide x, wide y, wide z) {
#if defined(__FMA__) && defined(__AVX2__)
    return (wide)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__ARM_FEATURE_FMA)
    for (int lane = 0; lane < LANES; lane++) z[lane] = __builtin_fmaf(x[lane], y[lane], z[lane]);
    return z;
#else
    return z + x * y;
#endif
}
INLINE float sum(wide v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
/* The same of four vectors, in the same order of additions. */
INLINE four sums(const wide *v) {
    four half[4];
    for (int i = 0; i < 4; i++) {
        const four *parts = (const four *)(v + i);
        half[i] = parts[0] + parts[1];
    }
    four even[2], odd[2];
    for (int i = 0; i < 2; i++) {
        even[i] = MIX(half[2 * i], half[2 * i + 1], 0, 4, 2, 6);
        odd[i] = MIX(half[2 * i], half[2 * i + 1], 1, 5, 3, 7);
    }
    return (MIX(even[0], even[1], 0, 1, 4, 5) + MIX(even[0], even[1], 2, 3, 6, 7)) +
           (MIX(odd[0], odd[1], 0, 1, 4, 5) + MIX(odd[0], odd[1], 2, 3, 6, 7));
}
INLINE float dot(const float *x, const void *y, int64_t n, int64_t kind) {
    wide total = all(0);
    for (int64_t i = 0; i < n; i += LANES) total = fuse(load(x + i), wide_at(y, i, kind), total);
    return sum(total);
}
/* As many numbers as a register has: for what is done to each number by itself. */
#ifdef __AVX512F__
enum { BROAD = 16 };
typedef __m512 broad;
INLINE broad broad_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void broad_store(float *x, broad v) { _mm512_storeu_ps(x, v); }
INLINE broad broad_all(float x) { return _mm512_set1_ps(x); }
INLINE broad broad_at(const void *x, int64_t i, int64_t kind) {
    if (kind != BF16) return _mm512_loadu_ps((const float *)x + i);
    __m256i halves = _mm256_loadu_si256((const __m256i *)((const bf16 *)x + i));
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
INLINE broad broad_fuse(broad x, broad y, broad z) { return _mm512_fmadd_ps(x, y, z); }
/* The largest size among numbers, of which there are a multiple of 16; NaN: one is not finite. */
static inline float largest_of(const float *x, int64_t n) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 finite = 0xffff;
    for (int64_t i = 0; i < n; i += BROAD) {
        __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        finite &= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
        most = _mm512_max_ps(most, size);
    }
    return finite == 0xffff ? _mm512_reduce_max_ps(most) : NAN;
}
#else
enum { BROAD = LANES };
typedef wide broad;
INLINE broad broad_load(const float *x) { return load(x); }
INLINE void broad_store(float *x, broad v) { store(x, v); }
INLINE broad broad_all(float x) { return all(x); }
INLINE broad broad_at(const void *x, int64_t i, int64_t kind) { return wide_at(x, i, kind); }
INLINE broad broad_fuse(broad x, broad y, broad z) { return fuse(x, y, z); }
#endif
INLINE wide smaller(wide x, wide y) {
    whole less = x < y;
    return (wide)(((whole)x & less) | ((whole)y & ~less));
}
INLINE wide larger(wide x, wide y) {
    whole more = x > y;
    return (wide)(((whole)x & more) | ((whole)y & ~more));
}

/* e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and a polynomial for e^r. */
INLINE wide exponential(wide x) {
    x = -smaller(-smaller(x, all(88.0f)), all(87.0f));
    wide n = x * all(1.44269504f);
    whole negative = n < all(0);
    whole power = __builtin_convertvector(
        n + (wide)(((whole)all(-0.5f) & negative) | ((whole)all(0.5f) & ~negative)), whole);
    n = __builtin_convertvector(power, wide);
    wide r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    wide y = all(1.9875691500e-4f);
    y = y * r + all(1.3981999507e-3f);
    y = y * r + all(8.3334519073e-3f);
    y = y * r + all(4.1665795894e-2f);
    y = y * r + all(1.6666665459e-1f);
    y = y * r + all(5.0000001201e-1f);
    y = y * r * r + r + all(1);
    return y * (wide)((power + 127) << 23);
}

#endif
