//! Finding what the rules speak of in one file system.

use std::collections::HashSet;

use bedplate_api::image::Trace;
use ext4_view::Ext4Error;

use super::rules::{Act, RULES, Rule, is_rotated, matches};
use crate::boot::volume::{Kind, Volume};

/// Names that are looked at in one file system. A server of many years has some thousand logs.
pub(super) const MAX_NAMES: usize = 200_000;

/// Bytes that the paths of all names may have that are looked at in one disk: what is found is held in memory, more than
/// once, and sent to people.
pub(super) const MAX_PATH_BYTES: usize = 4 << 20;

/// Directories inside each other below a rule's own. cloud-init and journald make three.
const MAX_DEPTH: usize = 32;

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Its content goes.
    Empty,
    /// It goes.
    Remove,
}

/// A file that belongs to one machine.
pub(super) struct Target {
    pub(super) trace: Trace,
    /// Its path in its file system.
    pub(super) path: Vec<u8>,
    pub(super) change: Change,
}

/// What was found.
#[derive(Default)]
pub(super) struct Targets {
    pub(super) files: Vec<Target>,
    /// Directories that shall go after what is in them, in this order.
    pub(super) dirs: Vec<Vec<u8>>,
}

/// Why a walk ended.
pub(super) enum WalkError {
    Read(Ext4Error),
    TooMany,
}

impl From<Ext4Error> for WalkError {
    fn from(e: Ext4Error) -> Self {
        Self::Read(e)
    }
}

/// Looks in `volume`, which is mounted at `mount` (for example `/var`; empty for the root). `room` is what is left of
/// [`MAX_PATH_BYTES`].
pub(super) fn walk(volume: &Volume, mount: &str, room: &mut usize) -> Result<Targets, WalkError> {
    let mut walk = Walk { volume, mount, names: 0, room, seen: HashSet::new(), found: Targets::default() };
    for rule in RULES {
        let path = format!("/{}", rule.path);
        if let Some(rest) = path.strip_prefix(mount).filter(|rest| rest.is_empty() || rest.starts_with('/')) {
            walk.follow(rule, rest)?;
        }
    }
    // What is inside was found later.
    walk.found.dirs.reverse();
    Ok(walk.found)
}

struct Walk<'a> {
    volume: &'a Volume,
    mount: &'a str,
    names: usize,
    room: &'a mut usize,
    /// What a rule has spoken of.
    seen: HashSet<Vec<u8>>,
    found: Targets,
}

impl Walk<'_> {
    fn follow(&mut self, rule: &Rule, pattern: &str) -> Result<(), WalkError> {
        for (path, kind) in self.places(pattern)? {
            match (rule.act, kind) {
                (Act::Empty, Kind::File(len)) if len > 0 && !self.is_unset(&path) => {
                    self.take(rule, path, Change::Empty);
                }
                (Act::Remove, Kind::File(_)) | (Act::Unlink, Kind::Link) => self.take(rule, path, Change::Remove),
                (Act::Clear | Act::Trim, Kind::Directory) if self.seen.insert(path.clone()) => {
                    self.below(rule, path)?
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Everything that `pattern` means, an absolute path with `*` in its names.
    fn places(&mut self, pattern: &str) -> Result<Vec<(Vec<u8>, Kind)>, WalkError> {
        let mut places = vec![(Vec::new(), Kind::Directory)];
        for name in pattern.split('/').skip(1) {
            let mut next = Vec::new();
            for (dir, _) in places.into_iter().filter(|(_, kind)| *kind == Kind::Directory) {
                if name.contains('*') {
                    let entries = self.entries(&dir)?.into_iter();
                    let meant = entries.filter(|(entry, _)| matches(name.as_bytes(), entry));
                    next.extend(meant.map(|(entry, kind)| (join(&dir, &entry), kind)));
                } else {
                    let path = join(&dir, name.as_bytes());
                    next.extend(self.volume.kind(&path)?.map(|kind| (path, kind)));
                }
            }
            places = next;
        }
        Ok(places)
    }

    /// Everything below the directory `top`.
    fn below(&mut self, rule: &Rule, top: Vec<u8>) -> Result<(), WalkError> {
        let mut dirs = vec![(top, 0)];
        while let Some((dir, depth)) = dirs.pop() {
            if depth > MAX_DEPTH {
                return Err(WalkError::TooMany);
            }
            for (name, kind) in self.entries(&dir)? {
                let path = join(&dir, &name);
                match (rule.act, kind) {
                    // Another rule may have spoken of it: the journal is in the directory of logs.
                    (_, Kind::Directory) if !self.seen.insert(path.clone()) => {}
                    (_, Kind::Directory) => {
                        if rule.act == Act::Clear {
                            self.found.dirs.push(path.clone());
                        }
                        dirs.push((path, depth + 1));
                    }
                    (Act::Clear, _) => self.take(rule, path, Change::Remove),
                    (_, Kind::File(_)) if is_rotated(&name) => self.take(rule, path, Change::Remove),
                    (_, Kind::File(1..)) => self.take(rule, path, Change::Empty),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn entries(&mut self, dir: &[u8]) -> Result<Vec<(Vec<u8>, Kind)>, WalkError> {
        let dir = if dir.is_empty() { b"/" } else { dir };
        let mut found = Vec::new();
        for entry in self.volume.entries(dir)? {
            self.names += 1;
            if self.names > MAX_NAMES {
                return Err(WalkError::TooMany);
            }
            let entry = entry?;
            *self.room = self.room.checked_sub(dir.len() + entry.0.len()).ok_or(WalkError::TooMany)?;
            found.push(entry);
        }
        Ok(found)
    }

    fn take(&mut self, rule: &Rule, path: Vec<u8>, change: Change) {
        if self.seen.insert(path.clone()) {
            let trace = Trace { kind: rule.kind, path: format!("{}{}", self.mount, printable(&path)) };
            self.found.files.push(Target { trace, path, change });
        }
    }

    /// Whether this machine id waits for the first boot, as `cloud-init clean --machine-id` leaves it.
    fn is_unset(&self, path: &[u8]) -> bool {
        let text = str::from_utf8(path).ok().and_then(|path| self.volume.text(path));
        text.is_some_and(|text| text.trim() == "uninitialized")
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir, b"/", name].concat()
}

/// The path for people, on one line.
fn printable(path: &[u8]) -> String {
    match str::from_utf8(path) {
        Ok(text) if !text.contains(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}
