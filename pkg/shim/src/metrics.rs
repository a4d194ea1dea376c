// SPDX-License-Identifier: Apache-2.0
//! The shim's numbers on a socket in its run folder, which only root can enter:
//! `curl --unix-socket /run/podhull/*/metrics.sock http://shim/metrics`.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use podhull_telemetry::Metrics;
use podhull_types::{Deadline, accept_again};
use tokio::net::UnixListener;

/// Prometheus' text format.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Time for one reader: the next one waits for it.
const READER: Duration = Duration::from_secs(5);

/// Listens at `path`, where nobody else listens: the folder is the pod's own.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// Answers one reader after the other, for ever. Dropped, it ends.
pub(crate) async fn serve(listener: &UnixListener, metrics: &Metrics) -> Infallible {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let answer = service_fn(async |request: hyper::Request<hyper::body::Incoming>| {
                    Ok::<_, Infallible>(answer(request.method(), metrics))
                });
                let reader = http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                match Deadline::after(READER).run(reader).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "metrics not read"),
                    Err(_) => tracing::debug!("a reader of the metrics was too slow"),
                }
            }
            Err(error) => {
                tracing::warn!(%error, "metrics: accept");
                if !accept_again(&error).await {
                    return std::future::pending().await;
                }
            }
        }
    }
}

fn answer(method: &Method, metrics: &Metrics) -> Response<String> {
    let status = |code| {
        let mut response = Response::new(String::new());
        *response.status_mut() = code;
        response
    };
    if method != Method::GET {
        return status(StatusCode::METHOD_NOT_ALLOWED);
    }
    match metrics.text() {
        Ok(text) => {
            let mut response = Response::new(text);
            let format = HeaderValue::from_static(FORMAT);
            response.headers_mut().insert(CONTENT_TYPE, format);
            response
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be encoded");
            status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    async fn ask(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn numbers_are_read_also_after_a_reader_that_speaks_something_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.sock");
        drop(listen(&path).unwrap());
        // As after a shim that was killed.
        let listener = listen(&path).unwrap();
        let metrics = Metrics::new().unwrap();
        metrics.vm_exits.with_label_values(&["died"]).inc();
        let asked = async {
            let odd = ask(&path, "hello\r\n\r\n").await;
            assert!(!odd.contains("podhull_"), "{odd}");
            let post = ask(
                &path,
                "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
            )
            .await;
            assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
            let text = ask(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
            assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
            assert!(text.contains(FORMAT), "{text}");
            assert!(
                text.contains(r#"podhull_vm_exits_total{reason="died"} 1"#),
                "{text}"
            );
        };
        tokio::select! {
            () = asked => {}
            never = serve(&listener, &metrics) => match never {},
        }
    }
}
