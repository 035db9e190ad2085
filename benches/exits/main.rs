//! What a guest exit costs in our VMM, against a loop that does nothing but `KVM_RUN` and a `match`.
//!
//! Both sides run the same guest code with the same memory, interrupt controllers and timer. The guest repeats one access;
//! our side sends it from the vCPU loop over the bus to a device that counts, the bare side counts in its `match`.
// A bench has nobody to report an error to.
#![allow(clippy::unwrap_used)]

mod bare;
mod bus;
mod guest;
mod ours;

use std::time::Duration;

use bedplate_benches::{Pair, Unit};
use criterion::Criterion;
use kvm_ioctls::Kvm;

use guest::Access;

fn main() {
    bedplate_benches::describe_machine();
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(20)
        .nresamples(5_000)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    bus::benchmark(&mut criterion);
    match Kvm::new() {
        Ok(_) => benchmark(&mut criterion),
        Err(error) => println!("skipped: all guest exits: /dev/kvm cannot be opened: {error}\n"),
    }
    criterion.final_summary();
}

fn benchmark(c: &mut Criterion) {
    let accesses = [
        ("exit dispatch, port write", Access::Port),
        ("exit dispatch, MMIO write", Access::Mmio),
        ("notify by ioeventfd", Access::Notify),
    ];
    for (what, access) in accesses {
        Pair { what, ours: "vmm", bare: "kvm-ioctls", unit: Unit::Operations }.run(
            c,
            |count| ours::run(access, count),
            |count| bare::run(access, count),
        );
    }
}
