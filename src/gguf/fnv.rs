/// FNV-1a (Fowler, Noll, Vo), 64 bits: the same in every run and version, which the standard library's hasher isn't. It tells damage and
/// other files apart, and resists nobody.
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Goes on with these bytes.
    pub fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    }

    /// The hash of all bytes so far.
    pub fn finish(&self) -> u64 {
        self.0
    }

    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut h = Fnv::default();
        h.write(bytes);
        h.finish()
    }
}
