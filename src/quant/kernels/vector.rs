//! The few vector operations that all kernels are written in.

/// A vector of [`LANES`](Self::LANES) 32-bit lanes on one instruction set; a lane is a row of the matrix.
///
/// A value of an implementing type proves that the processor has the instructions: making one is the
/// unsafe step (`new`), using it is not. All methods are to be inlined into a function compiled
/// with the instruction set's features, which is where the value is made.
pub(crate) trait Vector: Copy + 'static {
    /// 32-bit lanes.
    const LANES: usize;
    /// Whether there are 32 vector registers, not 16.
    const MANY_REGISTERS: bool;
    /// What [`signed`](Self::signed) adds to weights.
    const SIGNED_ZERO: i32;
    /// Whether the instruction for products of bytes can multiply all lanes of one register by one chosen lane of another. Sixteen
    /// activations are then loaded at once, where others spread each four of them over a register.
    const BY_LANE: bool = false;
    /// Products of bytes in each lane of [`multiply_add`](Self::multiply_add).
    const PRODUCTS: usize = 4;
    /// The fewest tokens with which a single pass of `gemv` prefetches weights; `None`: nothing ever does.
    const ASKS_FROM: Option<usize> = Some(1);
    /// The most tokens with which superblocks are multiplied as they are unpacked, without being stored in between.
    const FUSED: usize = usize::MAX;
    /// Whether [`panel`](Self::panel) takes away the code that stands for zero.
    const PANEL_SIGNED: bool = false;
    /// Integer lanes, or four bytes a lane.
    type I: Copy;
    /// f32 lanes.
    type F: Copy;

    /// The lanes at `p`, `4 * LANES` bytes in any alignment.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load(self, p: *const u8) -> Self::I;
    /// `LANES` bytes, each zero-extended.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_u8(self, p: *const u8) -> Self::I;
    /// `LANES` little-endian 16-bit numbers, each zero-extended.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_u16(self, p: *const u8) -> Self::I;
    /// `LANES` half-precision numbers as f32.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// Stores the lanes, `4 * LANES` bytes in any alignment.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store(self, p: *mut u8, x: Self::I);
    /// Sixteen bytes of each of `LANES` rows, the first at `p` and each `stride` bytes after the one before: vector j holds the rows'
    /// j-th four bytes, a row a lane.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_columns(self, p: *const u8, stride: usize) -> [Self::I; 4];
    /// Stores `LANES` f32.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store_f32(self, p: *mut f32, x: Self::F);

    /// Prefetches the cache line at `p`, which may be anything. See [`ASKS_FROM`](Self::ASKS_FROM).
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        let _ = p;
    }

    /// `x` in every lane.
    fn splat(self, x: u32) -> Self::I;
    /// Bitwise and.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise or.
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Lanes shifted left by `n`.
    fn shl(self, a: Self::I, n: u32) -> Self::I;
    /// The number at `p`, a sum of 32 bytes, in every lane, shifted left by `shift`, at most 7.
    ///
    /// # Safety
    /// It can be read.
    #[inline(always)]
    unsafe fn splat_sum(self, p: *const i32, shift: u32) -> Self::I {
        // SAFETY: the caller's promise.
        self.shl(self.splat(unsafe { p.read() }.cast_unsigned()), shift)
    }
    /// Every second of the sixteen numbers at `p`, from number `first` (0 or 1) on, in every lane, shifted left by `shift`.
    ///
    /// # Safety
    /// They can be read.
    #[inline(always)]
    unsafe fn splat_sums(self, p: *const i16, first: usize, shift: u32) -> [Self::I; 8] {
        // SAFETY: the caller's promise.
        let number = |i: usize| unsafe { i32::from(p.add(2 * i + first).read()).cast_unsigned() };
        std::array::from_fn(|i| self.shl(self.splat(number(i)), shift))
    }
    /// Lanes shifted right by `n`, zeros coming in.
    fn shr(self, a: Self::I, n: u32) -> Self::I;
    /// Lanes shifted right by `n`, copies of the sign coming in.
    fn sar(self, a: Self::I, n: u32) -> Self::I;
    /// Sum of lanes.
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a * b + c` of signed lanes.
    fn mul_add_i32(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I;
    /// The high nibbles of each byte.
    #[inline(always)]
    fn high_nibbles(self, a: Self::I) -> Self::I {
        self.and(self.shr(a, 4), self.splat(0x0f0f_0f0f))
    }
    /// The bytes of `codes`, each 0..=15, looked up in the table.
    fn lookup(self, table: &[i8; 16], codes: Self::I) -> Self::I;

    /// Signed bytes as [`dot`](Self::dot) takes them with `BITS = 8`: plus [`SIGNED_ZERO`](Self::SIGNED_ZERO).
    fn signed(self, w: Self::I) -> Self::I;
    /// `start` plus, in each lane, the dot product of the lane's `4 * N` bytes with those at `q`: exact.
    /// Weights are unsigned and less than `1 << bits`, or, if `bits` is 8, come from [`signed`](Self::signed).
    ///
    /// # Safety
    /// `4 * N` bytes at `q` can be read. They are -127..=127.
    unsafe fn dot<const N: usize>(self, start: Self::I, w: &[Self::I; N], q: *const i8, bits: u32) -> Self::I;

    /// [`dot`](Self::dot) of `R` groups of rows with `N` tokens, whose bytes are at `q`, on `start[t][r]`.
    ///
    /// # Safety
    /// As for `dot`, for each token.
    #[inline(always)]
    unsafe fn dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
    ) -> [[Self::I; R]; N] {
        let mut sums = start;
        for t in 0..N {
            for r in 0..R {
                // SAFETY: the caller's promise.
                sums[t][r] = unsafe { self.dot(start[t][r], w[r], q[t], bits) };
            }
        }
        sums
    }

    /// Codes that are unpacked once for many tokens, as [`panel_dots`](Self::panel_dots) takes them. The code `zero` stands for zero.
    #[inline(always)]
    fn panel<const K: usize>(self, codes: [Self::I; K], zero: i32) -> [Self::I; K] {
        let _ = zero;
        codes
    }

    /// [`dots`](Self::dots) of codes that went through [`panel`](Self::panel).
    ///
    /// # Safety
    /// As for `dot`, for each token.
    #[inline(always)]
    unsafe fn panel_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
    ) -> [[Self::I; R]; N] {
        // SAFETY: the caller's promise.
        unsafe { self.dots(start, w, q, bits) }
    }

    /// Signed numbers of at most eight bits in each lane, as [`scaled_dots`](Self::scaled_dots) takes them.
    #[inline(always)]
    fn factor(self, a: Self::I) -> Self::I {
        a
    }

    /// As [`panel_dots`](Self::panel_dots), each dot product times its row's factor: exact in 32 bits.
    ///
    /// # Safety
    /// As for `dot`, for each token.
    #[inline(always)]
    unsafe fn scaled_dots<const K: usize, const N: usize, const R: usize>(
        self,
        start: [[Self::I; R]; N],
        w: [&[Self::I; K]; R],
        q: [*const i8; N],
        bits: u32,
        factor: [Self::I; R],
    ) -> [[Self::I; R]; N] {
        let mut sums = start;
        // SAFETY: the caller's promise.
        let dots = unsafe { self.panel_dots([[self.splat(0); R]; N], w, q, bits) };
        for t in 0..N {
            for r in 0..R {
                sums[t][r] = self.mul_add_i32(dots[t][r], factor[r], sums[t][r]);
            }
        }
        sums
    }

    /// Signed numbers of 16 bits in the lanes of `a` and of `b`, as [`dot_pairs`](Self::dot_pairs) takes them.
    #[inline(always)]
    fn pair(self, a: Self::I, b: Self::I) -> Self::I {
        self.or(self.and(a, self.splat(0xffff)), self.shl(b, 16))
    }

    /// `start` plus the products of the two numbers of each lane's [`pair`](Self::pair) with the two at `p`.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn dot_pairs(self, start: Self::I, w: Self::I, p: *const i16) -> Self::I;

    /// `sum` and the products of its bytes with those of `w`, added up by the cheapest instructions for that, without regard to
    /// overflow: a step of the loop that shows how fast a core can multiply.
    fn multiply_add(self, sum: Self::I, w: Self::I) -> Self::I;

    /// Signed integers as f32.
    fn to_f32(self, a: Self::I) -> Self::F;
    /// Bits as f32.
    fn as_f32(self, a: Self::I) -> Self::F;
    /// `x` in every lane.
    fn splat_f32(self, x: f32) -> Self::F;
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
}
