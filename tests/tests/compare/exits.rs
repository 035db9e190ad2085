//! What an exit costs that goes to nobody: the way out of the guest, to the VMM's loop, through its bus, and back.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use bedplate_tests::inside::{figure, rounds};

use crate::bare;
use crate::figures::Figure;
use crate::guests::{self, EXITS, REPEAT, WAYS};
use crate::sides::{self, Extras, Side, Way};

/// Nanoseconds of each way.
pub type Times = [f64; 3];

/// Of `REPEAT` exits, from the times at which the guest said its words.
pub fn times(marks: [Instant; 4]) -> Times {
    [0, 1, 2].map(|way| (marks[way + 1] - marks[way]).as_nanos() as f64 / f64::from(REPEAT))
}

pub fn figures() -> Result<()> {
    fs::write(EXITS.kernel, guests::exits())?;
    let mut sides = sides::all()?;
    sides.push(sides::ours("bedplate without its sandbox", Way::NoSandbox));
    let names = ["a write to nobody's port", "a write to nobody's memory", "a read of nobody's memory"];
    let shares = [
        "a write to nobody's port, beyond the bare loop",
        "a write to nobody's memory, beyond the bare loop",
        "a read of nobody's memory, beyond the bare loop",
    ];
    let mut whole = names.map(|name| Figure::new(name, "ns", &sides));
    let mut share = shares.map(|name| Figure::new(name, "ns", &sides));
    for _ in 0..rounds() {
        let least = bare::run(&guests::exits())?;
        for (number, side) in sides.iter().enumerate() {
            let times = run(side)?;
            // Also, so that whoever waits outside knows that it goes on.
            figure(&format!("{} is done", side.name));
            for way in 0..times.len() {
                whole[way].add(number, times[way]);
                share[way].add(number, times[way] - least[way]);
            }
        }
        for (figure, least) in whole.iter_mut().zip(least) {
            figure.add_limit("a bare loop over KVM_RUN", least);
        }
    }
    whole.into_iter().chain(share).for_each(|figure| figure.say(&sides));
    Ok(())
}

fn run(side: &Side) -> Result<Times> {
    let mut vm = side.start(EXITS, Extras::default())?;
    let mut marks = [Instant::now(); 4];
    for (mark, word) in marks.iter_mut().zip(WAYS) {
        vm.hears(word).with_context(|| format!("{} and its guest of exits", side.name))?;
        *mark = Instant::now();
    }
    vm.process.kill()?;
    Ok(times(marks))
}
