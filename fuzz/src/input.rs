//! An input, read from front to back as decisions; zero after its end.

/// The rest of an input.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether the input is used up.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    pub(crate) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(crate) fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// A number that is small, near a power of two, or arbitrary: for tests of limits.
    pub(crate) fn number(&mut self) -> u64 {
        let (kind, byte) = (self.byte(), self.byte());
        let near = |shift: u32| (1u64 << (shift % 64)).wrapping_add(u64::from(byte % 5));
        match kind % 8 {
            0..=2 => u64::from(byte),
            3 => u64::from(byte) << 12,
            4 => near(u32::from(byte / 4)).wrapping_sub(2),
            5 => u64::from(byte).wrapping_neg(),
            6 => u64::from(self.word()),
            _ => u64::from(self.long()) << 32 | u64::from(self.long()),
        }
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }

    /// The next bytes, at most `most`.
    pub(crate) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        first
    }

    /// The remaining bytes.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }
}
