//! `unpack IMAGE DIRECTORY [TAG]`: unpacks an image into an empty directory and prints its default command and settings.

use koya_image::{Image, Options};
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(image), Some(root)) = (args.next(), args.next()) else {
        return Err("usage: unpack IMAGE DIRECTORY [TAG]".into());
    };
    let options = Options {
        tag: args.next().and_then(|tag| tag.into_string().ok()),
        ..Options::default()
    };
    let root = PathBuf::from(root);
    let scratch = root.with_extension("scratch");
    std::fs::create_dir(&scratch)?;
    let unpacked = Image::open(image.as_ref(), &scratch, &options).and_then(|image| {
        image.unpack(&root)?;
        Ok(image.defaults())
    });
    std::fs::remove_dir_all(&scratch)?;
    println!("{:#?}", unpacked?);
    Ok(())
}
