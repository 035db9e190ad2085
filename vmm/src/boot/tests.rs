//! Kernels that are not what they should be; a real one boots in the lab tests.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{ByteValued, GuestMemoryBackend};

use bedplate_api::vmm::ExitReason;

use super::*;
use crate::machine::lifecycle::Lifecycle;
use crate::memory::Pages;

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn try_load(bytes: &[u8], initrd: Option<&[u8]>) -> Result<(Entry, Ram), BootError> {
    let kernel = file(bytes);
    let initrd = initrd.map(file);
    let config = BootConfig {
        kernel: kernel.path().into(),
        initrd: initrd.as_ref().map(|f| f.path().into()),
        cmdline: "quiet".into(),
    };
    let ram = Ram::new(32, Pages::Normal).unwrap();
    load(&ram, &config, 0xe_0000, &[]).map(|(entry, _)| (entry, ram))
}

fn error(bytes: &[u8]) -> String {
    try_load(bytes, None).map(|_| ()).unwrap_err().to_string()
}

/// A bzImage whose code is `code`, loaded at 16 MiB.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let header = params::SetupHeader {
        setup_sects: 1,
        syssize: (code.len() / 16) as u32,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x10_0000,
        ..Default::default()
    };
    let mut image = vec![0; 1024];
    let at = params::HEADER_OFFSET as usize;
    image[at..at + size_of_val(&header)].copy_from_slice(header.as_slice());
    image.extend_from_slice(code);
    image
}

/// An ELF kernel with one segment at 1 MiB, entered there, whose file part is `code`.
fn elf(code: &[u8], in_memory: u64) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    for (at, value) in [(72, 0x1000), (88, 0x10_0000), (96, code.len() as u64), (104, in_memory)] {
        put(at, &value.to_le_bytes());
    }
    image.extend_from_slice(code);
    image
}

#[test]
fn a_bzimage_lies_where_it_wants_and_the_initrd_at_the_top() {
    let (entry, ram) = try_load(&bzimage(&[0xab; 4096]), Some(b"initrd")).unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x100_0200, zero_page: start::ZERO_PAGE });
    assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(0x100_0200)).unwrap(), 0xab);
    let initrd: u32 = ram.memory.read_obj(GuestAddress(start::ZERO_PAGE + 0x218)).unwrap();
    assert_eq!(initrd, (32 << 20) - 4096);
    let mut bytes = [0; 6];
    ram.memory.read_slice(&mut bytes, GuestAddress(initrd.into())).unwrap();
    assert_eq!(&bytes, b"initrd");
    assert!(ram.memory.address_in_range(GuestAddress(start::PAGE_TABLES)));
}

#[test]
fn a_bzimage_of_32_bits_is_entered_in_protected_mode() {
    let xloadflags = params::HEADER_OFFSET as usize + 0x45;
    let mut image = bzimage(&[0xab; 4096]);
    image[xloadflags] = 0;
    let (entry, ram) = try_load(&image, None).unwrap();
    assert_eq!(entry, Entry::Linux32 { rip: 0x100_0000, zero_page: start::ZERO_PAGE as u32 });
    let code: u64 =
        ram.memory.read_obj(GuestAddress(start::GDT_ADDRESS + u64::from(start::LINUX_CODE_SELECTOR))).unwrap();
    assert_eq!(code >> 53 & 3, 2, "descriptor {code:#x} is not of 32 bits");
    // A boot sector's protocol of before: nothing says how much room the kernel needs.
    image[params::HEADER_OFFSET as usize + 0x15] = 7;
    assert!(error(&image).contains("firmware_path"));
}

#[test]
fn an_elf_kernel_without_pvh_note_is_entered_in_64_bit_mode() {
    let (entry, ram) = try_load(&elf(&[0xcd; 100], 0x2000), None).unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x10_0000, zero_page: start::ZERO_PAGE });
    assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(0x10_0063)).unwrap(), 0xcd);
}

#[test]
fn damage_is_named() {
    let whole = bzimage(&[0; 4096]);
    assert!(error(&whole[..whole.len() - 16]).contains("header promises 5120"));
    assert!(try_load(&whole[..whole.len() - 15], None).is_ok(), "the last unit of 16 bytes need not be whole");
    assert!(error(&whole[..0x220]).contains("inside its header"));
    let mut empty = whole[..1020].to_vec();
    empty[params::HEADER_OFFSET as usize + 3..][..4].fill(0);
    assert!(error(&empty).contains("header promises 1024"));
    let whole = elf(&[0; 4096], 4096);
    assert!(error(&whole[..whole.len() - 1]).contains("segment 0 ends beyond"));
    assert!(error(&whole[..80]).contains("inside its headers"));
    let mut other_machine = whole.clone();
    other_machine[18] = 183;
    assert!(error(&other_machine).contains("another machine"));
    let mut short = whole.clone();
    (short[4], short[18]) = (1, 3);
    assert!(error(&short).contains("of 32 bits"));
    let mut many = whole.clone();
    let entry: [u8; 56] = many[64..120].try_into().unwrap();
    (0..65).for_each(|n| many[64 + 56 * n..][..56].copy_from_slice(&entry));
    many[56..58].copy_from_slice(&64u16.to_le_bytes());
    assert!(try_load(&many, None).is_ok(), "they may lie on top of each other");
    many[56..58].copy_from_slice(&65u16.to_le_bytes());
    assert!(error(&many).contains("more than 64 segments"));
    let mut nowhere = whole;
    nowhere[88..96].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(error(&nowhere).contains("wants to lie at"));
    let huge = error(&elf(&[0; 16], u64::MAX));
    assert!(huge.contains("segment 0 at 0x100000 wants 18446744073709551615 bytes"), "{huge}");
}

#[test]
fn other_files_are_recognised_and_too_large_kernels_refused() {
    assert!(error(b"").contains("empty"));
    assert!(error(b"\x1f\x8b\x08rest").contains("gzip"));
    assert!(error(b"070701rest").contains("initrd_path"));
    assert!(error(&[0; 0x300]).contains("something else"));
    assert!(error(&elf(&[0; 16], 64 << 20)).contains("does not fit into 32 MiB"));
    let too_large = try_load(&bzimage(&[0; 4096]), Some(&vec![0; 20 << 20])).map(|_| ()).unwrap_err();
    assert!(too_large.to_string().starts_with("initrd "), "{too_large}");
    let missing = BootConfig { kernel: "/nowhere/vmlinuz".into(), initrd: None, cmdline: String::new() };
    let message = load(&Ram::new(32, Pages::Normal).unwrap(), &missing, 0, &[]).map(|_| ()).unwrap_err().to_string();
    assert!(message.starts_with("kernel /nowhere/vmlinuz: No such file"), "{message}");
}

/// Kernel code and an initial RAM disk, in which no two words of 8 bytes are alike.
fn large() -> (Vec<u8>, Vec<u8>) {
    let words = |range: std::ops::Range<u64>| range.flat_map(u64::to_le_bytes).collect::<Vec<_>>();
    // Neither fills its last part.
    (words(0..(5 << 20) / 8), words(1 << 32..(1 << 32) + (7 << 20) / 8 + 1))
}

/// Loaded into `ram` for a machine with this life, which has no vCPUs.
fn begin(ram: &Ram, kernel: &Path, initrd: &Path) -> (Arc<Lifecycle>, Loading) {
    let config = BootConfig { kernel: kernel.into(), initrd: Some(initrd.into()), cmdline: "quiet".into() };
    let (_, loading) = load(ram, &config, 0xe_0000, &[]).unwrap();
    let ended = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    (Arc::new(Lifecycle::new(ended)), loading.expect("this user may make a userfaultfd"))
}

fn bytes_at(ram: &Ram, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_guest_finds_everything_that_is_read_after_it_has_begun() {
    let (code, initrd) = large();
    let (kernel_file, initrd_file) = (file(&bzimage(&code)), file(&initrd));
    for pages in [Pages::Normal, Pages::Transparent] {
        // Its last part is half of one.
        let ram = Ram::new(33, pages).unwrap();
        let (life, loading) = begin(&ram, kernel_file.path(), initrd_file.path());
        // There before anything was started.
        assert_eq!(bytes_at(&ram, 0x100_0200, 4096), code[0x200..0x1200]);
        let loader = loading.start(&life).unwrap();
        // The last first: nobody has to wait for his turn.
        let at = (33u64 << 20) - (initrd.len() as u64).next_multiple_of(4096);
        assert_eq!(bytes_at(&ram, at, initrd.len() + 8), [&initrd[..], &[0; 8]].concat(), "{pages:?}");
        assert_eq!(bytes_at(&ram, 0x100_0000, code.len() + 8), [&code[..], &[0; 8]].concat(), "{pages:?}");
        assert!(loader.wait(Duration::from_secs(60)));
        assert!(life.exit().is_none());
    }
}

#[test]
fn who_shares_memory_has_it_all_read_before_the_guest_begins() {
    let (code, initrd) = large();
    let (kernel, initrd_file) = (file(&bzimage(&code)), file(&initrd));
    let config =
        BootConfig { kernel: kernel.path().into(), initrd: Some(initrd_file.path().into()), cmdline: "quiet".into() };
    let ram = Ram::with_sharing(32, Pages::Normal, crate::memory::Sharing::Backends).unwrap();
    let (_, loading) = load(&ram, &config, 0xe_0000, &[]).unwrap();
    assert!(loading.is_none());
    let mut found = vec![0; code.len()];
    ram.file.read_exact_at(&mut found, 0x100_0000).unwrap();
    assert!(found == code);
    let mut found = vec![0; initrd.len()];
    ram.file.read_exact_at(&mut found, (32 << 20) - (initrd.len() as u64).next_multiple_of(4096)).unwrap();
    assert!(found == initrd);
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_read_ends_the_vm_by_name() {
    let (code, initrd) = large();
    let (kernel_file, initrd_file) = (file(&bzimage(&code)), file(&initrd));
    let ram = Ram::new(32, Pages::Normal).unwrap();
    let (life, loading) = begin(&ram, kernel_file.path(), initrd_file.path());
    initrd_file.as_file().set_len(1 << 20).unwrap();
    drop(loading.start(&life).unwrap());
    let exit = life.exit().unwrap();
    assert_eq!(exit.reason, ExitReason::HostFault);
    assert!(exit.detail.contains("initrd") && exit.detail.contains("has become shorter"), "{}", exit.detail);
    // Nobody waits for it for ever.
    assert_eq!(bytes_at(&ram, (32 << 20) - 4096, 8), [0; 8]);
}

#[test]
fn a_file_that_is_written_to_while_it_is_read_ends_the_vm_by_name() {
    let (code, initrd) = large();
    let (kernel_file, initrd_file) = (file(&bzimage(&code)), file(&initrd));
    let ram = Ram::new(32, Pages::Normal).unwrap();
    let (life, loading) = begin(&ram, kernel_file.path(), initrd_file.path());
    // As a copy of another kernel in its place would do, at another time than it was made.
    kernel_file.as_file().write_all_at(&[1], 1 << 20).unwrap();
    kernel_file.as_file().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    drop(loading.start(&life).unwrap());
    let exit = life.exit().unwrap();
    assert!(exit.detail.starts_with("kernel ") && exit.detail.contains("was written to"), "{}", exit.detail);
}

#[test]
fn a_machine_that_has_ended_reads_no_more() {
    let (code, initrd) = large();
    let (kernel_file, initrd_file) = (file(&bzimage(&code)), file(&initrd));
    let ram = Ram::new(32, Pages::Normal).unwrap();
    let (life, loading) = begin(&ram, kernel_file.path(), initrd_file.path());
    life.end(ExitReason::Stopped, "the test");
    drop(loading.start(&life).unwrap());
    assert_eq!(life.exit().unwrap().detail, "the test");
    assert_eq!(bytes_at(&ram, 0x100_0000 + (4 << 20), 8), [0; 8]);
}
