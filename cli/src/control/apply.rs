//! `bedplate apply`: tiers as a file says.

use std::io::Read;
use std::path::{Path, PathBuf};

use bedplate_api::control::{TierSpec, TierView};
use comfy_table::Cell;
use serde::Serialize;

use super::{ControlArgs, Error, Session};
use crate::output::{self, Format, Health};

/// Largest file of tiers that is read: a hundred bytes per tier, and nobody has a million.
const MAX_FILE: u64 = 1 << 20;

/// `bedplate apply`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bedplate apply -f tiers.yaml
  bedplate apply -f tiers.yaml --dry-run
  cat tiers.yaml | bedplate apply -f -

The file is a list of tiers; what is not given has the default of `bedplate tier create`:
  - name: web
    image: web
    target: 4
    cpus: 1
    memory_mib: 512
    disk: non_persistent    # or persistent
    active: true

Tiers that the file does not name are left alone.")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    /// The file; - reads stdin
    #[arg(short, long)]
    file: PathBuf,
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// A file of tiers that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {}: {source}; name a file of tiers, or - for stdin (`bedplate apply --help` shows the form)",
            path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody has that many tiers.
    #[error("{} is larger than {MAX_FILE} bytes: that is no list of tiers", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It says something that is not understood; nothing was changed.
    #[error("{}: {source}; nothing was changed (`bedplate apply --help` shows the form)", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What and where, with line and column.
        source: serde_yaml_ng::Error,
    },
    /// Two tiers of one name; nothing was changed.
    #[error("{}: the tier {name:?} is there twice; nothing was changed", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

/// What is done about one tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Change {
    name: String,
    action: Action,
    /// Fields that differ: `target 2 → 4`.
    fields: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    Create,
    Change,
    Keep,
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let wanted = read(&args.file)?;
    let session = Session::open(&args.control.control)?;
    let current = session.wait(session.client.tiers())?;
    let changes: Vec<Change> = wanted.iter().map(|spec| compare(&current, spec)).collect();
    if !args.dry_run {
        for (spec, change) in wanted.iter().zip(&changes) {
            if change.action != Action::Keep {
                session.wait(session.client.put_tier(spec))?;
            }
        }
    }
    let empty = "The file names no tier.";
    output::list(format, &changes, empty, &["TIER", "ACTION", "WHAT"], |change| {
        let health = if change.action == Action::Keep { Health::Off } else { Health::Busy };
        vec![
            Cell::new(&change.name),
            output::state(&output::word(&change.action), health),
            Cell::new(change.fields.join(", ")),
        ]
    })?;
    if args.dry_run {
        output::note("Nothing was changed (--dry-run).");
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<TierSpec>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let mut limited: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin().take(MAX_FILE + 1))
    } else {
        Box::new(std::fs::File::open(path).map_err(failed)?.take(MAX_FILE + 1))
    };
    limited.read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Vec<TierSpec>, FileError> {
    // An empty file is an empty list, not "missing field".
    let tiers: Option<Vec<TierSpec>> =
        serde_yaml_ng::from_str(text).map_err(|source| FileError::Malformed { path: path.to_owned(), source })?;
    let tiers = tiers.unwrap_or_default();
    for (i, tier) in tiers.iter().enumerate() {
        if tiers[..i].iter().any(|earlier| earlier.name == tier.name) {
            return Err(FileError::Twice { path: path.to_owned(), name: tier.name.clone() });
        }
    }
    Ok(tiers)
}

fn compare(current: &[TierView], wanted: &TierSpec) -> Change {
    let name = wanted.name.clone();
    let Some(view) = current.iter().find(|view| view.spec.name == name) else {
        let what = format!("{} of {}{}", wanted.target, wanted.image, if wanted.active { "" } else { ", inactive" });
        return Change { name, action: Action::Create, fields: vec![what] };
    };
    // Exhaustive, so that a field added to the API is compared here too.
    let TierSpec { name: _, image, target, cpus, memory_mib, disk, active } = &view.spec;
    let fields: Vec<String> = [
        differ("image", image, &wanted.image),
        differ("target", target, &wanted.target),
        differ("cpus", cpus, &wanted.cpus),
        differ("memory_mib", memory_mib, &wanted.memory_mib),
        differ("disk", &output::word(disk), &output::word(&wanted.disk)),
        differ("active", active, &wanted.active),
    ]
    .into_iter()
    .flatten()
    .collect();
    let action = if fields.is_empty() { Action::Keep } else { Action::Change };
    Change { name, action, fields }
}

fn differ<T: PartialEq + ToString>(field: &str, old: &T, new: &T) -> Option<String> {
    (old != new).then(|| format!("{field} {} → {}", old.to_string(), new.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bedplate_api::Digest;

    fn file(text: &str) -> Result<Vec<TierSpec>, FileError> {
        parse(Path::new("tiers.yaml"), text)
    }

    #[test]
    fn what_is_not_given_has_its_default() {
        let tiers = file("- {name: web, image: web, target: 4}\n").unwrap();
        assert_eq!((tiers[0].cpus, tiers[0].memory_mib, tiers[0].active), (1, 512, false));
        assert_eq!(file("").unwrap(), []);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let error = file("- name: web\n  imge: web\n  target: 4\n").unwrap_err().to_string();
        assert!(error.contains("tiers.yaml") && error.contains("imge") && error.contains("line 2"), "{error}");
        let error = file("- name: web\n  image: web\n  target: many\n").unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
        let twice = file("- {name: a, image: x, target: 1}\n- {name: a, image: x, target: 2}\n").unwrap_err();
        assert!(matches!(twice, FileError::Twice { .. }), "{twice}");
    }

    #[test]
    fn only_what_differs_is_changed() {
        let spec = file("- {name: web, image: web, target: 4}").unwrap().remove(0);
        let view = TierView { spec: spec.clone(), digest: Digest::ZERO, assigned: 0, running: 0, detail: None };
        assert_eq!(compare(&[], &spec).action, Action::Create);
        assert_eq!(compare(std::slice::from_ref(&view), &spec).action, Action::Keep);
        let more = TierSpec { target: 6, active: true, ..spec };
        let change = compare(&[view], &more);
        assert_eq!(change.fields, ["target 4 → 6", "active false → true"]);
        assert_eq!(change.action, Action::Change);
    }
}
