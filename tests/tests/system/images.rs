//! Configurations of images, and archives in the formats of other programs.

use crate::tool::{
    Background, architecture, koya, saved_image, scratch, shared_rootfs, stdout, until,
};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    a_working_directory_is_made,
    a_container_is_stopped_by_its_own_signal,
    an_entrypoint_can_be_taken_away,
    users_have_the_groups_of_the_image,
    one_of_several_images_is_chosen,
    a_layout_of_compressed_layers_runs,
    an_image_that_is_cut_leaves_nothing,
];

/// An image of the tests' root file system.
fn image(name: &str, config: Value) -> Result<PathBuf> {
    let dir = scratch(name)?;
    saved_image(&dir, Some("koya/test:1"), |layer| {
        json!({"architecture": architecture(), "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]}})
        .to_string()
    })
}

fn run(image: &Path, options: &[&str], command: &[&str]) -> Result<String> {
    let mut all = koya(["run", "--image"]);
    all.arg(image).args(options).arg("--").args(command);
    stdout(all.output()?)
}

fn a_working_directory_is_made() -> Result<()> {
    let config = json!({"Cmd": ["sh", "-c", "pwd; ls -d /data/of/it"], "WorkingDir": "/srv/not/there",
        "Volumes": {"/data/of/it": {}}, "Env": ["PATH=/bin"]});
    let image = image("image-workdir", config)?;
    ensure!(run(&image, &[], &[])? == "/srv/not/there\n/data/of/it");
    ensure!(run(&image, &["-w", "/made/by/the/user"], &["pwd"])? == "/made/by/the/user");
    Ok(())
}

fn a_container_is_stopped_by_its_own_signal() -> Result<()> {
    let script = "trap 'echo usr1; exit 7' USR1; trap 'echo usr2; exit 8' USR2; echo up; \
        while :; do sleep 0.1; done";
    let config =
        json!({"Cmd": ["sh", "-c", script], "StopSignal": "SIGUSR1", "Env": ["PATH=/bin"]});
    let image = image("image-stop", config)?;
    for (name, options, said) in [
        ("image-stop-own", &[][..], "up\nusr1"),
        (
            "image-stop-user",
            &["--stop-signal", "USR2"][..],
            "up\nusr2",
        ),
    ] {
        let mut all = koya(["run", "-d", "--name", name, "--image"]);
        stdout(all.arg(&image).args(options).output()?)?;
        let container = Background { name: name.into() };
        let log = || stdout(koya(["logs", name]).output()?);
        until("the container is up", || Ok((log()? == "up").then_some(())))?;
        stdout(koya(["stop", "-t", "60", name]).output()?)?;
        ensure!(log()? == said, "{}", log()?);
        drop(container);
    }
    Ok(())
}

fn an_entrypoint_can_be_taken_away() -> Result<()> {
    let config =
        json!({"Entrypoint": ["sh", "-c"], "Cmd": ["echo of the image"], "Env": ["PATH=/bin"]});
    let image = image("image-entrypoint", config)?;
    ensure!(run(&image, &[], &[])? == "of the image");
    ensure!(run(&image, &["--entrypoint", ""], &["echo", "mine"])? == "mine");
    let mut none = koya(["run", "--entrypoint", "", "--image"]);
    let output = none.arg(&image).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(125) && said.contains("no command"),
        "{said}"
    );
    Ok(())
}

fn users_have_the_groups_of_the_image() -> Result<()> {
    let config = json!({"Cmd": ["sh", "-c", "id -u; id -G"], "User": "33:", "Env": ["PATH=/bin"]});
    let image = image("image-user", config)?;
    let passwd = fs::read_to_string(shared_rootfs().join("etc/passwd"))?;
    let web = passwd.lines().find(|line| line.starts_with("web:"));
    ensure!(
        web.is_some_and(|line| line.starts_with("web:x:33:33:")),
        "{passwd}"
    );
    let by_number = run(&image, &[], &[])?;
    ensure!(by_number.starts_with("33\n33"), "{by_number}");
    ensure!(run(&image, &["-u", "web"], &[])? == by_number);
    ensure!(run(&image, &["-u", "web:0"], &[])? == "33\n0");
    Ok(())
}

fn one_of_several_images_is_chosen() -> Result<()> {
    let dir = scratch("image-tags")?;
    let one = saved_image(&dir, None, |_| json!({"config": {}}).to_string())?;
    let manifest = json!([
        {"Config": "c.json", "RepoTags": ["koya/test:1"], "Layers": ["l/layer.tar"]},
        {"Config": "two.json", "RepoTags": ["koya/test:2"], "Layers": ["l/layer.tar"]}]);
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    fs::write(
        dir.join("two.json"),
        json!({"config": {"Env": ["WHICH=two"]}}).to_string(),
    )?;
    let archive = dir.join("both.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&dir).arg("-cf").arg(&archive);
    tar.args(["c.json", "two.json", "manifest.json", "l"]);
    ensure!(tar.status()?.success(), "tar -cf");
    ensure!(run(&archive, &["--tag", "2"], &["sh", "-c", "echo $WHICH"])? == "two");
    let mut none = koya(["run", "--image"]);
    let output = none.arg(&archive).args(["--", "true"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("koya/test:1, koya/test:2"), "{said}");
    ensure!(run(&one, &[], &["echo", "alone"])? == "alone");
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

fn a_layout_of_compressed_layers_runs() -> Result<()> {
    let dir = scratch("image-layout")?;
    let tar = saved_image(&dir, None, |_| "{}".into())?
        .with_file_name("l")
        .join("layer.tar");
    let blobs = dir.join("layout/blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let blob = |kind: &str, bytes: &[u8]| -> Result<Value> {
        let digest = digest(bytes);
        fs::write(blobs.join(&digest[7..]), bytes)?;
        Ok(json!({"mediaType": kind, "digest": digest, "size": bytes.len()}))
    };
    let packed = Command::new("zstd").args(["-q", "-c"]).arg(&tar).output()?;
    ensure!(packed.status.success(), "zstd");
    let config = json!({"architecture": architecture(), "os": "linux",
        "config": {"Cmd": ["sh", "-c", "echo by layout"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(&fs::read(&tar)?)]}});
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": docker,
        "config": blob("application/vnd.docker.container.image.v1+json", config.to_string().as_bytes())?,
        "layers": [blob("application/vnd.oci.image.layer.v1.tar+zstd", &packed.stdout)?]});
    let mut own = blob(docker, manifest.to_string().as_bytes())?;
    own["platform"] = json!({"architecture": architecture(), "os": "linux"});
    let mut other = own.clone();
    other["platform"]["architecture"] = "s390x".into();
    other["digest"] = digest(b"not here").into();
    let index = json!({"schemaVersion": 2, "manifests": [other, own]});
    fs::write(dir.join("layout/index.json"), index.to_string())?;
    fs::write(
        dir.join("layout/oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    ensure!(run(&dir.join("layout"), &[], &[])? == "by layout");
    // An archive that is compressed as a whole.
    let archive = dir.join("layout.tar.gz");
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(&dir)
        .arg("-czf")
        .arg(&archive)
        .arg("layout");
    ensure!(tar.status()?.success(), "tar -czf");
    ensure!(run(&archive, &[], &[])? == "by layout");
    Ok(())
}

fn an_image_that_is_cut_leaves_nothing() -> Result<()> {
    let whole = image("image-cut", json!({"Cmd": ["true"]}))?;
    let cut = whole.with_file_name("cut.tar");
    let bytes = fs::read(&whole)?;
    for len in [bytes.len() / 2, bytes.len() - 20_000] {
        fs::write(&cut, &bytes[..len])?;
        let mut all = koya(["run", "--name", "image-cut", "--image"]);
        let output = all.arg(&cut).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125), "{output:?}");
        ensure!(
            said.lines().count() == 1 && said.contains("image"),
            "{said}"
        );
        ensure!(
            !Path::new("/var/lib/koya/containers/image-cut").exists(),
            "left"
        );
    }
    Ok(())
}
