//! The head of a core dump: an ELF file of 64 bits for x86-64, with a note for each vCPU and a segment for each region of
//! guest memory.

use crate::kvm::VcpuState;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Segments begin at pages, so that their holes are the file's.
pub const ALIGN: u64 = 4096;

const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;
const NT_PRSTATUS: u32 = 1;
const NT_FPREGSET: u32 = 2;
/// Length of Linux's `struct elf_prstatus`, where its process id is, and where its registers are.
const PRSTATUS: usize = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;
/// Whether floating-point registers follow.
const PRSTATUS_HAS_FP: usize = 328;
/// Length of an `FXSAVE` image, and where its registers are.
const FXSAVE: usize = 512;
const FXSAVE_ST: usize = 32;
const FXSAVE_XMM: usize = 160;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// All that comes before the segments, padded so that the first begins at a page; and where each of them begins.
pub fn head(vcpus: &[VcpuState], segments: &[Segment]) -> (Vec<u8>, Vec<u64>) {
    let notes: Vec<u8> = vcpus.iter().enumerate().flat_map(|(index, vcpu)| notes_of(index, vcpu)).collect();
    let headers = 1 + segments.len();
    let notes_at = ELF_HEADER + headers * PROGRAM_HEADER;
    let mut at = ((notes_at + notes.len()) as u64).next_multiple_of(ALIGN);
    let len = at as usize;

    let mut head = Vec::with_capacity(len);
    head.extend_from_slice(b"\x7fELF");
    // 64 bits, little endian, version 1.
    head.extend_from_slice(&[2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    put16(&mut head, &[ET_CORE, EM_X86_64]);
    put32(&mut head, &[1]);
    // No entry, program headers right behind, no sections.
    put64(&mut head, &[0, ELF_HEADER as u64, 0]);
    put32(&mut head, &[0]);
    // Few: a header for each of at most three regions, and one for the notes.
    put16(&mut head, &[ELF_HEADER as u16, PROGRAM_HEADER as u16, headers as u16, 0, 0, 0]);
    put32(&mut head, &[PT_NOTE, 0]);
    put64(&mut head, &[notes_at as u64, 0, 0, notes.len() as u64, notes.len() as u64, 4]);
    let mut offsets = Vec::with_capacity(segments.len());
    for Segment { address, len } in segments {
        put32(&mut head, &[PT_LOAD, READ_WRITE_EXECUTE]);
        // Virtual addresses are as many as there are page tables: a reader finds them by the physical ones.
        put64(&mut head, &[at, *address, *address, *len, *len, ALIGN]);
        offsets.push(at);
        // RAM and files are far smaller than what an offset holds.
        at += len.next_multiple_of(ALIGN);
    }
    head.extend_from_slice(&notes);
    head.resize(len, 0);
    (head, offsets)
}

fn put16(bytes: &mut Vec<u8>, values: &[u16]) {
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn put32(bytes: &mut Vec<u8>, values: &[u32]) {
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn put64(bytes: &mut Vec<u8>, values: &[u64]) {
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// The notes of one vCPU, as Linux has them for a thread, and one with its system registers, as QEMU has it: from that, tools
/// that look into kernels find where the kernel has moved itself.
fn notes_of(index: usize, vcpu: &VcpuState) -> Vec<u8> {
    let mut notes = note("CORE", NT_PRSTATUS, &prstatus(index, vcpu));
    notes.extend(note("CORE", NT_FPREGSET, &fxsave(vcpu)));
    notes.extend(note("QEMU", 0, &system(vcpu)));
    notes
}

fn note(name: &str, kind: u32, content: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    // With the zero that ends the name. All of ours are short.
    put32(&mut note, &[name.len() as u32 + 1, content.len() as u32, kind]);
    note.extend_from_slice(name.as_bytes());
    note.resize(note.len().next_multiple_of(4) + if name.len().is_multiple_of(4) { 4 } else { 0 }, 0);
    note.extend_from_slice(content);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

fn prstatus(index: usize, VcpuState { regs, sregs, .. }: &VcpuState) -> [u8; PRSTATUS] {
    let mut status = [0; PRSTATUS];
    // 0 is no process.
    status[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(index as u32 + 1).to_le_bytes());
    let registers = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        // Of a system call that is to be made again: none.
        u64::MAX,
        regs.rip,
        sregs.cs.selector.into(),
        regs.rflags,
        regs.rsp,
        sregs.ss.selector.into(),
        sregs.fs.base,
        sregs.gs.base,
        sregs.ds.selector.into(),
        sregs.es.selector.into(),
        sregs.fs.selector.into(),
        sregs.gs.selector.into(),
    ];
    for (place, value) in status[PRSTATUS_REGISTERS..].chunks_exact_mut(8).zip(registers) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    status[PRSTATUS_HAS_FP] = 1;
    status
}

fn fxsave(VcpuState { fpu, .. }: &VcpuState) -> Vec<u8> {
    let mut image = Vec::with_capacity(FXSAVE);
    put16(&mut image, &[fpu.fcw, fpu.fsw, fpu.ftwx.into(), fpu.last_opcode]);
    put64(&mut image, &[fpu.last_ip, fpu.last_dp]);
    put32(&mut image, &[fpu.mxcsr, 0xffff]);
    debug_assert_eq!(image.len(), FXSAVE_ST);
    image.extend(fpu.fpr.as_flattened());
    debug_assert_eq!(image.len(), FXSAVE_XMM);
    image.extend(fpu.xmm.as_flattened());
    image.resize(FXSAVE, 0);
    image
}

fn system(VcpuState { regs, sregs, .. }: &VcpuState) -> Vec<u8> {
    /// Of the first form of this note; it ends before the base of the kernel's GS.
    const VERSION: u32 = 1;
    const LEN: u32 = 432;
    let mut note = Vec::with_capacity(LEN as usize);
    put32(&mut note, &[VERSION, LEN]);
    put64(&mut note, &[regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp]);
    put64(&mut note, &[regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15]);
    put64(&mut note, &[regs.rip, regs.rflags]);
    let segments = [&sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss, &sregs.ldt, &sregs.tr];
    for segment in segments {
        // As the upper half of a descriptor has them.
        let flags = u32::from(segment.type_) << 8
            | u32::from(segment.s) << 12
            | u32::from(segment.dpl) << 13
            | u32::from(segment.present) << 15
            | u32::from(segment.avl) << 20
            | u32::from(segment.l) << 21
            | u32::from(segment.db) << 22
            | u32::from(segment.g) << 23;
        put32(&mut note, &[segment.selector.into(), segment.limit, flags, 0]);
        put64(&mut note, &[segment.base]);
    }
    for table in [&sregs.gdt, &sregs.idt] {
        put32(&mut note, &[0, table.limit.into(), 0, 0]);
        put64(&mut note, &[table.base]);
    }
    // There is no cr1.
    put64(&mut note, &[sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4]);
    debug_assert_eq!(note.len(), LEN as usize);
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_head_is_what_a_reader_of_elf_expects() {
        let mut vcpu = VcpuState::default();
        (vcpu.regs.rip, vcpu.regs.rsp, vcpu.regs.r15, vcpu.sregs.cr3) = (0x1234_5678_9abc, 0xaaaa, 0xffff, 0x3000);
        (vcpu.fpu.mxcsr, vcpu.fpu.xmm[15]) = (0x1f80, [9; 16]);
        let segments = [Segment { address: 0, len: 0xc000_0000 }, Segment { address: 1 << 32, len: 0x1000 }];
        let (head, offsets) = head(&[vcpu, VcpuState::default()], &segments);
        assert_eq!(&head[..6], b"\x7fELF\x02\x01");
        assert_eq!((u32_at(&head, 16), u64_at(&head, 32), head[56]), (62 << 16 | 4, 64, 3));
        assert_eq!(offsets, [head.len() as u64, head.len() as u64 + 0xc000_0000]);
        assert!(head.len().is_multiple_of(4096));
        let second = 64 + 2 * 56;
        assert_eq!((u32_at(&head, second), u64_at(&head, second + 8)), (1, offsets[1]));
        assert_eq!((u64_at(&head, second + 24), u64_at(&head, second + 32)), (1 << 32, 0x1000));
        // The notes, one after the other.
        let (mut at, len) = (u64_at(&head, 64 + 8) as usize, u64_at(&head, 64 + 32) as usize);
        let end = at + len;
        let mut found = Vec::new();
        while at < end {
            let [name, content, kind] = [0, 4, 8].map(|field| u32_at(&head, at + field));
            let text = String::from_utf8(head[at + 12..at + 12 + name as usize - 1].to_vec()).unwrap();
            let start = at + 12 + (name as usize).next_multiple_of(4);
            found.push((text, kind, head[start..start + content as usize].to_vec()));
            at = start + (content as usize).next_multiple_of(4);
        }
        assert_eq!(at, end);
        let names: Vec<_> = found.iter().map(|(name, kind, note)| (name.as_str(), *kind, note.len())).collect();
        let one = [("CORE", 1, 336), ("CORE", 2, 512), ("QEMU", 0, 432)];
        assert_eq!(names, [one, one].concat());
        let (status, fp, system) = (&found[0].2, &found[1].2, &found[2].2);
        assert_eq!((u64_at(status, 112), u64_at(status, 112 + 16 * 8)), (0xffff, 0x1234_5678_9abc));
        assert_eq!((u32_at(status, 32), u32_at(&found[3].2, 32)), (1, 2), "threads by number");
        assert_eq!((u32_at(fp, 24), fp[160 + 15 * 16]), (0x1f80, 9));
        assert_eq!(u64_at(system, 432 - 16), 0x3000);
    }
}
