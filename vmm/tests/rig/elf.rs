//! Kernels of a few instructions.

/// An ELF kernel that is `code`, at 1 MiB, entered in 64-bit mode.
pub fn kernel(code: &[&[u8]]) -> Vec<u8> {
    let code = code.concat();
    let mut image = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    for (at, value) in [(16, 2u16), (18, 62), (54, 56), (56, 1)] {
        put(at, &value.to_le_bytes());
    }
    put(64, &1u32.to_le_bytes());
    let len = code.len() as u64;
    for (at, value) in [(24, 0x10_0000u64), (32, 64), (72, 0x1000), (88, 0x10_0000), (96, len), (104, len)] {
        put(at, &value.to_le_bytes());
    }
    image.extend_from_slice(&code);
    image
}
