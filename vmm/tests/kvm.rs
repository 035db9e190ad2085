//! Small guests under this machine's `/dev/kvm`: exits, dispatch, ends, pause. Where there is no KVM these tests say so
//! and check nothing; the lab tests cover the same in an emulated machine that has it.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bedplate_api::vmm::ExitReason;
use bedplate_devices::bus::BusDevice;
use bedplate_devices::host::{Doorbell, TransportHost};
use bedplate_vmm::machine::PauseError;
use bedplate_vmm::machine::bare::BareMachine;
use bedplate_vmm::machine::lifecycle::Lifecycle;
use vmm_sys_util::eventfd::EventFd;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Port whose first write ends the machine with what was written.
const END_PORT: u64 = 0xe0;

struct End(Arc<Lifecycle>);
impl BusDevice for End {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.end(ExitReason::Stopped, format!("{data:x?}"));
    }
}

/// Remembers writes and answers reads with a counter.
#[derive(Default)]
struct Recorder {
    writes: Vec<(u64, Vec<u8>)>,
    reads: u8,
}
impl BusDevice for Recorder {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.reads += 1;
        data.fill(self.reads);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.writes.push((offset, data.to_vec()));
    }
}

/// A machine with `code`, or none where this host has no KVM.
fn machine(code: &[u8]) -> Option<BareMachine> {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        println!("skipped: /dev/kvm cannot be opened here; the lab tests cover this in an emulated machine");
        return None;
    }
    let machine = BareMachine::new(code).unwrap();
    machine.buses.ports.insert(END_PORT, 1, Arc::new(Mutex::new(End(machine.lifecycle())))).unwrap();
    Some(machine)
}

#[test]
fn port_accesses_reach_their_device_at_every_width_and_strings_item_by_item() {
    #[rustfmt::skip]
    let code = [
        0xba, 0x10, 0x00,                         // mov dx, 0x10
        0xb0, 0x5a, 0xee,                         // mov al, 0x5a; out dx, al
        0xb8, 0x34, 0x12, 0xef,                   // mov ax, 0x1234; out dx, ax
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12,       // mov eax, 0x12345678
        0x66, 0xef,                               // out dx, eax
        0xbe, 0x00, 0x10, 0xb9, 0x02, 0x00,       // mov si, 0x1000; mov cx, 2
        0xfc, 0xf3, 0x6e,                         // cld; rep outsb: the first two bytes of this code
        0xec, 0xe6, 0xe0,                         // in al, dx; out 0xe0, al
    ];
    let Some(machine) = machine(&code) else { return };
    let recorder = Arc::new(Mutex::new(Recorder::default()));
    machine.buses.ports.insert(0x10, 8, Arc::clone(&recorder) as _).unwrap();
    let (exit, counts) = machine.run();
    assert_eq!((exit.reason, exit.detail.as_str()), (ExitReason::Stopped, "[1]"));
    let writes: Vec<Vec<u8>> = recorder.lock().unwrap().writes.iter().map(|(_, data)| data.clone()).collect();
    let strings: [&[u8]; 5] = [&[0x5a], &[0x34, 0x12], &[0x78, 0x56, 0x34, 0x12], &[0xba], &[0x10]];
    assert_eq!(writes, strings);
    assert_eq!((counts.port_read, counts.unknown_port, counts.unknown_mmio), (1, 0, 0));
}

#[test]
fn what_nobody_answers_reads_as_ones_and_is_counted() {
    #[rustfmt::skip]
    let code = [
        0xba, 0x34, 0x02, 0xee,                   // mov dx, 0x234; out dx, al
        0x66, 0xed, 0x66, 0x40,                   // in eax, dx; inc eax: zero if it was all ones
        0x66, 0xbb, 0x00, 0x00, 0x00, 0xd0,       // mov ebx, 0xd0000000
        0x0f, 0x94, 0xc0, 0xe6, 0xe0,             // sete al; out 0xe0, al
    ];
    let Some(machine) = machine(&code) else { return };
    let (exit, counts) = machine.run();
    assert_eq!(exit.detail, "[1]");
    assert_eq!((counts.unknown_port, counts.port_read, counts.port_write), (2, 1, 2));
}

#[test]
fn model_specific_registers_that_kvm_lacks_are_harmless_or_fault() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xb9, 0x9c, 0x01, 0x00, 0x00,       // mov ecx, 0x19c: a thermometer
        0x66, 0xb8, 0xff, 0xff, 0xff, 0xff,       // mov eax, -1
        0x0f, 0x32, 0x0f, 0x30,                   // rdmsr; wrmsr
        0x66, 0x83, 0xf8, 0x00, 0x0f, 0x94, 0xc3, // cmp eax, 0; sete bl
        0xc7, 0x06, 0x34, 0x00, 0x2d, 0x10,       // mov word [0x34], 0x102d: the handler of #GP
        0xc7, 0x06, 0x36, 0x00, 0x00, 0x00,       // mov word [0x36], 0
        0x66, 0xb9, 0x00, 0xff, 0xff, 0x7f,       // mov ecx, 0x7fffff00: nothing
        0x0f, 0x32, 0xb3, 0x00,                   // rdmsr; mov bl, 0
        0x88, 0xd8, 0xe6, 0xe0,                   // 0x102d: mov al, bl; out 0xe0, al
    ];
    let Some(machine) = machine(&code) else { return };
    let (exit, counts) = machine.run();
    assert_eq!(exit.detail, "[1]");
    assert_eq!((counts.msr_read, counts.msr_write, counts.unknown_msr), (2, 1, 1));
}

/// The device lies right behind the 2 MiB of RAM.
#[test]
fn memory_mapped_accesses_and_notifies() {
    const MMIO: u64 = 0x20_0000;
    #[rustfmt::skip]
    let code = [
        // Unreal mode: load a flat 4 GiB limit into ds, so that real-mode code reaches beyond 1 MiB.
        0x0f, 0x01, 0x16, 0x40, 0x10,             // lgdt [0x1040]
        0x0f, 0x20, 0xc0, 0x0c, 0x01,             // mov eax, cr0; or al, 1
        0x0f, 0x22, 0xc0,                         // mov cr0, eax
        0xbb, 0x08, 0x00, 0x8e, 0xdb,             // mov bx, 8; mov ds, bx
        0x24, 0xfe, 0x0f, 0x22, 0xc0,             // and al, 0xfe; mov cr0, eax
        0x66, 0xbe, 0x00, 0x00, 0x20, 0x00,       // mov esi, 0x200000
        0x67, 0x66, 0xc7, 0x06, 0xef, 0xbe, 0xad, 0xde, // mov dword [esi], 0xdeadbeef
        0x67, 0x66, 0xc7, 0x06, 7, 0, 0, 0,       // mov dword [esi], 7: an ioeventfd
        0xe6, 0xe4,                               // out 0xe4, al: another one
        0x67, 0x8a, 0x06, 0xe6, 0xe0,             // mov al, [esi]; out 0xe0, al
    ];
    let mut image = code.to_vec();
    image.resize(0x40, 0x90);
    image.extend_from_slice(&[0x0f, 0x00, 0x48, 0x10, 0x00, 0x00, 0, 0]); // limit 15, base 0x1048
    image.extend_from_slice(&[0; 8]);
    image.extend_from_slice(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
    let Some(machine) = machine(&image) else { return };
    let recorder = Arc::new(Mutex::new(Recorder::default()));
    machine.buses.mmio.insert(MMIO, 0x10, Arc::clone(&recorder) as _).unwrap();
    let notify = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.interrupts().add_doorbell(Doorbell::Port(0xe4), &notify).unwrap();
    assert!(machine.interrupts().add_doorbell(Doorbell::Port(0xe4), &notify).is_err(), "the same twice");
    let [seven, eight] = [(), ()].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
    for (value, event) in [(7, &seven), (8, &eight)] {
        machine.interrupts().add_doorbell(Doorbell::Register { address: MMIO, value }, event).unwrap();
    }
    let (exit, counts) = machine.run();
    assert_eq!(exit.detail, "[1]");
    assert_eq!(recorder.lock().unwrap().writes, [(0, vec![0xef, 0xbe, 0xad, 0xde])]);
    assert_eq!((notify.read().unwrap(), seven.read().unwrap()), (1, 1));
    assert!(eight.read().is_err());
    assert_eq!((counts.mmio_write, counts.mmio_read, counts.unknown_mmio), (1, 1, 0));
}

#[test]
fn a_paused_vcpu_stands_still_and_a_resumed_one_goes_on() {
    struct Ticks(Arc<AtomicUsize>);
    impl BusDevice for Ticks {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let Some(machine) = machine(&[0xe6, 0x10, 0xeb, 0xfc]) else { return }; // out 0x10, al; jmp back
    let ticks = Arc::new(AtomicUsize::new(0));
    machine.buses.ports.insert(0x10, 1, Arc::new(Mutex::new(Ticks(Arc::clone(&ticks))))).unwrap();
    let life = machine.lifecycle();
    let vcpu = std::thread::spawn(move || machine.run());
    let moved_from = |from: usize| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while ticks.load(Ordering::SeqCst) == from {
            assert!(Instant::now() < deadline, "the vCPU does not run");
            std::thread::yield_now();
        }
    };
    moved_from(0);
    for _ in 0..50 {
        life.pause(PATIENCE).unwrap();
        let still = ticks.load(Ordering::SeqCst);
        (0..100).for_each(|_| std::thread::yield_now());
        assert_eq!(ticks.load(Ordering::SeqCst), still);
        life.resume();
        moved_from(still);
    }
    // An end reaches a paused vCPU, too, and one in a busy loop without exits would be kicked by signal.
    life.pause(PATIENCE).unwrap();
    life.end(ExitReason::Stopped, "enough");
    let (exit, counts) = vcpu.join().unwrap();
    assert_eq!(exit.detail, "enough");
    assert!(counts.interrupted >= 51, "{counts:?}");
    assert_eq!(life.pause(PATIENCE), Err(PauseError::Ended));
}

#[test]
fn a_vcpu_that_a_device_holds_up_is_not_paused_and_goes_on() {
    /// Says that it is called, and goes on when it is told to.
    struct Stall(Sender<()>, Receiver<()>);
    impl BusDevice for Stall {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {
            self.0.send(()).unwrap();
            self.1.recv_timeout(PATIENCE).unwrap();
        }
    }
    let Some(machine) = machine(&[0xe6, 0x10, 0xe6, 0xe0]) else { return }; // out 0x10, al; out 0xe0, al
    let ((calls, called), (go, goes)) = (channel(), channel());
    machine.buses.ports.insert(0x10, 1, Arc::new(Mutex::new(Stall(calls, goes)))).unwrap();
    let life = machine.lifecycle();
    let vcpu = std::thread::spawn(move || machine.run());
    called.recv_timeout(PATIENCE).unwrap();
    assert_eq!(life.pause(Duration::from_secs(1)), Err(PauseError::Busy(1)));
    go.send(()).unwrap();
    assert_eq!(vcpu.join().unwrap().0.detail, "[0]", "it has not gone on");
}

#[test]
fn a_vcpu_whose_thread_dies_ends_the_machine() {
    struct Fault;
    impl BusDevice for Fault {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {
            panic!("as if");
        }
    }
    let Some(machine) = machine(&[0xe6, 0x10, 0xeb, 0xfe]) else { return }; // out 0x10, al; then spin
    machine.buses.ports.insert(0x10, 1, Arc::new(Mutex::new(Fault))).unwrap();
    let life = machine.lifecycle();
    assert!(std::thread::spawn(move || machine.run()).join().is_err());
    let exit = life.exit().unwrap();
    assert_eq!(exit.reason, ExitReason::HostFault);
    assert!(exit.detail.contains("the thread of vCPU 0 has died"), "{}", exit.detail);
    assert_eq!(life.pause(PATIENCE), Err(PauseError::Ended));
}

#[test]
fn a_guest_that_never_exits_is_ended_from_outside() {
    let Some(machine) = machine(&[0xe6, 0x10, 0xeb, 0xfe]) else { return }; // out 0x10, al; then spin without exits
    let started = EventFd::new(0).unwrap();
    struct Start(EventFd);
    impl BusDevice for Start {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {
            self.0.write(1).unwrap();
        }
    }
    let device = Start(started.try_clone().unwrap());
    machine.buses.ports.insert(0x10, 1, Arc::new(Mutex::new(device))).unwrap();
    let life = machine.lifecycle();
    let vcpu = std::thread::spawn(move || machine.run());
    started.read().unwrap();
    life.end(ExitReason::Stopped, "first");
    life.end(ExitReason::HostFault, "second");
    assert_eq!(vcpu.join().unwrap().0.detail, "first");
}
