//! GRUB's configuration: enough of its language to find the entry that would be started.
//!
//! `grub.cfg` is a script. It is not executed: its menu entries are read in order, and of its conditions both branches. What
//! is needed from it (`linux`, `initrd`, `set default`) is the same in either branch of what distributions generate.

use std::collections::BTreeMap;

/// Entries of all menus that are read.
const MAX_ENTRIES: usize = 1000;

/// Blocks within blocks. Menus of menus of menus are rare; a file with more than this was not written for GRUB.
const MAX_DEPTH: usize = 32;

/// One word of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    text: String,
    /// A variable stands in it, outside of single quotes: its text is not what GRUB would see.
    variable: bool,
}

/// One menu entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// What people see.
    pub title: String,
    /// What configuration calls it by.
    id: String,
    /// Titles and ids of the submenus around it, from the outside, and then its own.
    names: Vec<[String; 2]>,
    /// Its number in its menu, and before it those of the menus around it.
    position: Vec<usize>,
    /// Path of the kernel.
    pub kernel: String,
    /// Paths of the initial RAM disks.
    pub initrds: Vec<String>,
    /// The command line, variables dropped.
    pub cmdline: String,
}

/// All entries with a kernel, the one that would be started first, then the rest in order. `env` is the content of `grubenv`.
pub fn entries(config: &str, env: &str) -> Vec<Entry> {
    let mut parser = Parser::new(env);
    for line in config.replace("\\\n", " ").lines() {
        parser.line(&words(line));
        if parser.blocks.len() > MAX_DEPTH {
            break;
        }
    }
    let mut entries = parser.entries;
    entries.retain(|entry| !entry.kernel.is_empty());
    if let Some(chosen) = parser.default.and_then(|default| choose(&entries, &default)) {
        let entry = entries.remove(chosen);
        entries.insert(0, entry);
    }
    entries
}

/// The entry that `default` names: a number, a title, an id, or several of those with `>` between them.
fn choose(entries: &[Entry], default: &str) -> Option<usize> {
    let steps: Vec<&str> = default.split('>').map(str::trim).collect();
    let fits = |entry: &&Entry| {
        steps.len() <= entry.position.len()
            && steps.iter().zip(entry.position.iter().zip(&entry.names)).all(|(step, (number, names))| {
                step.parse() == Ok(*number) || names.iter().any(|name| !name.is_empty() && name == step)
            })
    };
    // The first that fits: a submenu stands for its first entry. An id alone may also name an entry of a submenu.
    let first = entries.iter().find(fits).or_else(|| entries.iter().find(|entry| entry.id == default));
    first.and_then(|chosen| entries.iter().position(|entry| entry == chosen))
}

/// What a `{` opened.
enum Block {
    Menu { position: usize, names: [String; 2], entries: usize },
    Entry,
    Other,
}

struct Parser {
    env: BTreeMap<String, String>,
    blocks: Vec<Block>,
    /// Entries of the top menu so far.
    top: usize,
    entries: Vec<Entry>,
    default: Option<String>,
}

impl Parser {
    fn new(env: &str) -> Self {
        let pairs = env.lines().filter_map(|line| line.split_once('='));
        Self {
            env: pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            blocks: Vec::new(),
            top: 0,
            entries: Vec::new(),
            default: None,
        }
    }

    fn line(&mut self, words: &[Word]) {
        let Some((command, arguments)) = words.split_first() else { return };
        match command.text.as_str() {
            "menuentry" | "submenu" => self.open_menu(command.text == "submenu", arguments),
            "set" if self.blocks.is_empty() => self.set(arguments),
            "linux" | "linux16" | "linuxefi" => self.kernel(arguments),
            "initrd" | "initrd16" | "initrdefi" => self.initrds(arguments),
            _ => {
                for word in words.iter().filter(|word| !word.variable) {
                    match word.text.as_str() {
                        "{" => self.blocks.push(Block::Other),
                        "}" => drop(self.blocks.pop()),
                        _ => {}
                    }
                }
            }
        }
    }

    fn open_menu(&mut self, submenu: bool, arguments: &[Word]) {
        let title = arguments.first().map(|word| word.text.clone()).unwrap_or_default();
        let is_id = |word: &Word| word.text == "--id" || word.text.contains("menuentry_id_option");
        let id = arguments.iter().position(is_id).and_then(|at| arguments.get(at + 1));
        let names = [title.clone(), id.map(|word| word.text.clone()).unwrap_or_default()];
        let menu = self.blocks.iter_mut().rev().find_map(|block| match block {
            Block::Menu { entries, .. } => Some(entries),
            _ => None,
        });
        let counter = menu.unwrap_or(&mut self.top);
        let position = *counter;
        *counter += 1;
        if submenu {
            self.blocks.push(Block::Menu { position, names, entries: 0 });
            return;
        }
        if self.entries.len() < MAX_ENTRIES {
            let mut entry = Entry { title, id: names[1].clone(), ..Entry::default() };
            for block in &self.blocks {
                if let Block::Menu { position, names, .. } = block {
                    entry.position.push(*position);
                    entry.names.push(names.clone());
                }
            }
            entry.position.push(position);
            entry.names.push(names);
            self.entries.push(entry);
        }
        self.blocks.push(Block::Entry);
    }

    fn set(&mut self, arguments: &[Word]) {
        let Some(word) = arguments.first() else { return };
        let Some(value) = word.text.strip_prefix("default=") else { return };
        if !word.variable {
            self.default = Some(value.to_owned());
        } else if value.contains("saved_entry")
            && let Some(saved) = self.env.get("saved_entry").filter(|saved| !saved.is_empty())
        {
            self.default = Some(saved.clone());
        }
    }

    /// The entry that is being read and is still without what `field` returns.
    fn entry(&mut self) -> Option<&mut Entry> {
        let inside = self.blocks.iter().any(|block| matches!(block, Block::Entry));
        if inside { self.entries.last_mut() } else { None }
    }

    fn kernel(&mut self, arguments: &[Word]) {
        let Some((path, rest)) = arguments.split_first() else { return };
        let Some(entry) = self.entry().filter(|entry| entry.kernel.is_empty()) else { return };
        entry.kernel = file_path(path);
        entry.cmdline = cmdline(rest);
    }

    fn initrds(&mut self, arguments: &[Word]) {
        if let Some(entry) = self.entry().filter(|entry| entry.initrds.is_empty()) {
            entry.initrds = arguments.iter().map(file_path).filter(|path| !path.is_empty()).collect();
        }
    }
}

/// The path of a file without the device in front of it; empty when a variable stands in it.
fn file_path(word: &Word) -> String {
    let text = &word.text;
    let path = match text.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        Some((_, path)) => path,
        // ($root)/… names the partition that is searched anyway; any other variable is unknown.
        None if word.variable => "",
        None => text,
    };
    if path.contains('$') { String::new() } else { path.to_owned() }
}

/// Words that the kernel shall see, as one line. Words with variables are GRUB's own affair.
fn cmdline(words: &[Word]) -> String {
    let mut line = String::new();
    for word in words.iter().filter(|word| !word.variable && !word.text.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        match word.text.split_once('=') {
            // The kernel reads key="value with spaces".
            Some((key, value)) if word.text.contains(' ') => line.push_str(&format!("{key}=\"{value}\"")),
            _ if word.text.contains(' ') => line.push_str(&format!("\"{}\"", word.text)),
            _ => line.push_str(&word.text),
        }
    }
    line
}

/// Splits a line as GRUB does: quotes, escapes, comments; `{`, `}` and `;` stand alone only between spaces, as they do in
/// what is generated.
fn words(line: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut word: Option<Word> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if quote.is_none() && (c.is_whitespace() || c == ';') {
            words.extend(word.take());
            continue;
        }
        if quote.is_none() && c == '#' && word.is_none() {
            break;
        }
        let current = word.get_or_insert_with(|| Word { text: String::new(), variable: false });
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), _) if c == open => quote = None,
            (None | Some('"'), '\\') => current.text.extend(chars.next()),
            _ => {
                current.variable |= c == '$' && quote != Some('\'');
                current.text.push(c);
            }
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the shape that Debian's grub-mkconfig gives it.
    const DEBIAN: &str = r#"
set have_grubenv=true
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
set linux_gfx_mode=
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-5c3a' {
	load_video
	search --no-floppy --fs-uuid --set=root 5c3a
	echo	'Loading Linux 6.1.0-18-cloud-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-18-cloud-amd64 root=PARTUUID=0fa3-11 ro  console=tty0 console=ttyS0,115200 $vt_handoff dyndbg="file a.c +p"
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1.0-18-cloud-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-5c3a' {
	menuentry 'Debian, with Linux 6.1.0-18' --class debian $menuentry_id_option 'gnulinux-6.1.0-18-advanced-5c3a' {
		linux	/boot/vmlinuz-6.1.0-18-cloud-amd64 root=PARTUUID=0fa3-11 ro
		initrd	/boot/initrd.img-6.1.0-18-cloud-amd64
	}
	menuentry 'Debian, with Linux 6.1.0-17' --class debian $menuentry_id_option 'gnulinux-6.1.0-17-advanced-5c3a' {
		linux	/boot/vmlinuz-6.1.0-17-cloud-amd64 root=PARTUUID=0fa3-11 ro
		initrd	($root)/boot/early.cpio /boot/initrd.img-6.1.0-17-cloud-amd64
	}
}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
	fwsetup
}
"#;

    #[test]
    fn the_default_entry_comes_first() {
        let found = entries(DEBIAN, "");
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].title, "Debian GNU/Linux");
        assert_eq!(found[0].kernel, "/boot/vmlinuz-6.1.0-18-cloud-amd64");
        assert_eq!(found[0].initrds, ["/boot/initrd.img-6.1.0-18-cloud-amd64"]);
        assert_eq!(
            found[0].cmdline,
            "root=PARTUUID=0fa3-11 ro console=tty0 console=ttyS0,115200 dyndbg=\"file a.c +p\""
        );
    }

    #[test]
    fn every_way_to_name_the_default() {
        for (default, title) in [
            ("1>1", "Debian, with Linux 6.1.0-17"),
            ("1", "Debian, with Linux 6.1.0-18"),
            ("gnulinux-advanced-5c3a>gnulinux-6.1.0-17-advanced-5c3a", "Debian, with Linux 6.1.0-17"),
            ("gnulinux-6.1.0-17-advanced-5c3a", "Debian, with Linux 6.1.0-17"),
            ("Advanced options for Debian GNU/Linux>Debian, with Linux 6.1.0-17", "Debian, with Linux 6.1.0-17"),
            ("nonsense", "Debian GNU/Linux"),
            ("2", "Debian GNU/Linux"),
        ] {
            let config = DEBIAN.replace("default=\"0\"", &format!("default=\"{default}\""));
            assert_eq!(entries(&config, "")[0].title, title, "{default}");
            let saved = DEBIAN.replace("default=\"0\"", "default=\"${saved_entry}\"");
            let env = format!("# GRUB Environment Block\nsaved_entry={default}\n####");
            assert_eq!(entries(&saved, &env)[0].title, title, "saved {default}");
        }
        let found = entries(&DEBIAN.replace("default=\"0\"", "default=\"1>1\""), "");
        assert_eq!(found[0].initrds, ["/boot/early.cpio", "/boot/initrd.img-6.1.0-17-cloud-amd64"]);
    }

    #[test]
    fn braces_and_quotes_in_odd_places() {
        let config = "menuentry \"it's {\" {\n linux /k a='b c' # comment\n initrd /i\n}\nmenuentry x { linux /l }";
        let found = entries(config, "");
        assert_eq!(found[0].title, "it's {");
        assert_eq!(found[0].cmdline, "a=\"b c\"");
        assert_eq!(entries("linux /outside\n}}}}\nmenuentry", ""), []);
        assert_eq!(entries("menuentry a {\nlinux $prefix/k\n}", ""), []);
        // Were it followed, each entry would carry the names of all menus around it.
        let deep = "submenu a {\n".repeat(100_000) + &"menuentry b {\nlinux /k\n}\n".repeat(1000);
        assert_eq!(entries(&deep, ""), []);
    }

    proptest::proptest! {
        #[test]
        fn noise_never_panics(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "menuentry ", "submenu ", "'", "\"", "{", "}", "\n", "linux ", "initrd ", "set default=", "$x", "\\", ">", "1",
                "(", ")", "/k ", "#", "--id ", "é", "\0",
            ]), 0..200),
        ) {
            let _ = entries(&parts.concat(), "saved_entry=1>1");
        }
    }
}
