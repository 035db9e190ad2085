//! Imports a disk image into a store and says what was found in it:
//! `cargo run --release -p bedplate-images --example import -- STORE IMAGE`.

use std::ops::ControlFlow;
use std::path::Path;

use bedplate_images::Store;
use bedplate_images::import::{Options, import_disk};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, image] = arguments.as_slice() else {
        eprintln!("usage: import STORE IMAGE");
        std::process::exit(2);
    };
    if let Err(error) = run(Path::new(store), Path::new(image)) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run(store: &Path, image: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::create(store)?;
    let start = std::time::Instant::now();
    let imported = import_disk(&store, image, Options::default(), &mut |_, _| ControlFlow::Continue(()))?;
    println!("{} in {:.1?}", imported.digest, start.elapsed());
    for line in &imported.report {
        println!("  {line}");
    }
    for (name, part) in &imported.manifest.parts {
        println!("  part {name}: {} bytes, {} of content", part.size, part.content);
    }
    Ok(())
}
