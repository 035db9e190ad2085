//! Making an image of a VM's disk: what is shown while it goes on, and what came of it.

use std::cell::RefCell;
use std::collections::BTreeMap;

use bedplate_api::control::{CapturePhase, Captured};
use bedplate_api::image::Trace;

use crate::output::{self, Format, PrintError};
use crate::progress::Progress;

/// A bar for each phase that counts bytes.
#[derive(Debug, Default)]
pub struct Bars {
    current: RefCell<Option<(CapturePhase, Progress)>>,
}

impl Bars {
    /// It is so far.
    pub fn set(&self, phase: CapturePhase, done: u64, total: u64) {
        let mut current = self.current.borrow_mut();
        let (_, bar) = match current.take_if(|(of, _)| *of == phase) {
            Some(same) => current.insert(same),
            None => {
                finish(current.take());
                current.insert((phase, Progress::new(words(phase), total)))
            }
        };
        bar.set(done, total);
    }

    /// All of it is done.
    pub fn finish(self) {
        finish(self.current.into_inner());
    }
}

fn finish(bar: Option<(CapturePhase, Progress)>) {
    match bar {
        Some((CapturePhase::Snapshot | CapturePhase::Clean, bar)) => bar.finish("done"),
        Some((_, bar)) => bar.finish(""),
        None => {}
    }
}

const fn words(phase: CapturePhase) -> &'static str {
    match phase {
        CapturePhase::Snapshot => "copying the disk on its node",
        CapturePhase::Fetch => "fetching what was written",
        CapturePhase::Merge => "merging it with the image",
        CapturePhase::Clean => "removing what belongs to one machine",
        CapturePhase::Store => "storing what is new",
    }
}

/// Prints what came of it; `machine` is whose disk it was.
///
/// # Errors
/// Stdout is gone.
pub fn print(captured: &Captured, machine: &str, format: Format) -> Result<(), PrintError> {
    if format == Format::Json {
        return output::json(captured);
    }
    let image = &captured.image;
    output::line(&format!("{} is {} now", image.name, image.digest))?;
    let new = captured.chunks - captured.reused.min(captured.chunks);
    output::line(&format!("{} of content; {new} of {} chunks are new", output::bytes(image.content), captured.chunks))?;
    match &captured.unfrozen {
        None => output::line("its file systems had come to rest")?,
        Some(why) => output::line(&format!("its file systems may be as after a power cut: {why}"))?,
    }
    for (kind, paths) in by_kind(captured.removed.iter()) {
        output::line(&format!("removed   {kind:<11} {}", paths.join(" ")))?;
    }
    for (kind, paths) in by_kind(captured.left.iter().map(|left| &left.trace)) {
        output::line(&format!("still in  {kind:<11} {}", paths.join(" ")))?;
    }
    if !captured.left.is_empty() {
        output::note(&format!("What is still in it belongs to {machine} alone; -o json says why each stays."));
    }
    captured.notes.iter().for_each(|note| output::note(note));
    Ok(())
}

fn by_kind<'a>(traces: impl Iterator<Item = &'a Trace>) -> BTreeMap<String, Vec<&'a str>> {
    let mut kinds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for trace in traces {
        kinds.entry(output::word(&trace.kind)).or_default().push(&trace.path);
    }
    kinds
}
