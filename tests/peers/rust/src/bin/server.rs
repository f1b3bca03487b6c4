//! A server by the Rust SDK, both eras: `server stdio` or `server PORT`.
use std::sync::Arc;

use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use rmcp::{
    ErrorData, Json, RoleServer, ServerHandler, ServiceExt,
    handler::server::{tool::InputResponses, wrapper::Parameters},
    model::*,
    prompt, prompt_handler, prompt_router,
    schemars::{self, JsonSchema},
    service::RequestContext,
    tool, tool_handler, tool_router,
    transport::{StreamableHttpService, stdio, streamable_http_server::session::local::LocalSessionManager},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

#[derive(Deserialize, JsonSchema)]
struct Addends {
    a: i64,
    b: i64,
}

#[derive(Serialize, JsonSchema)]
struct Sum {
    sum: i64,
}

#[derive(Deserialize, JsonSchema)]
struct Message {
    message: String,
}

#[derive(Deserialize, JsonSchema)]
struct Who {
    name: String,
}

#[derive(Clone)]
struct Peer;

#[tool_router]
impl Peer {
    #[tool]
    async fn add(&self, Parameters(Addends { a, b }): Parameters<Addends>) -> Json<Sum> {
        Json(Sum { sum: a + b })
    }

    #[tool]
    async fn echo(&self, Parameters(Message { message }): Parameters<Message>) -> String {
        message
    }

    #[tool]
    async fn fail(&self) -> Result<String, String> {
        Err("broken on purpose".into())
    }

    #[tool]
    async fn steps(&self, meta: RequestMetaObject, context: RequestContext<RoleServer>) -> String {
        for done in 1..=3 {
            if let Some(token) = meta.get_progress_token() {
                let step = ProgressNotificationParam::new(token, done as f64).with_total(3.0);
                let _ = context.peer.notify_progress(step).await;
            }
        }
        "stepped".into()
    }

    // The eras have two ways of asking.
    #[tool]
    async fn ask(
        &self, context: RequestContext<RoleServer>, InputResponses(answers): InputResponses,
    ) -> Result<CallToolResponse, ErrorData> {
        let question = ElicitRequestParams::FormElicitationParams {
            meta: None,
            message: "Who?".into(),
            requested_schema: ElicitationSchema::from_type::<Who>().unwrap(),
        };
        let modern = context.protocol_version() >= Some(ProtocolVersion::V_2026_07_28);
        let answer = match answers {
            Some(answers) => json!(answers["who"]),
            None if modern => {
                let who = InputRequest::Elicitation(ElicitRequest::new(question));
                let questions = [("who".to_string(), who)].into_iter().collect();
                return Ok(InputRequiredResult::new(Some(questions), None).into());
            }
            None => match context.peer.create_elicitation(question).await {
                Ok(answer) => json!(answer),
                Err(error) => return Err(ErrorData::internal_error(error.to_string(), None)),
            },
        };
        let name = answer["content"]["name"].as_str().unwrap_or("nobody");
        Ok(CallToolResult::success(vec![ContentBlock::text(format!("Hello, {name}"))]).into())
    }
}

#[prompt_router]
impl Peer {
    #[prompt]
    async fn greet(&self, Parameters(Who { name }): Parameters<Who>) -> Vec<PromptMessage> {
        vec![PromptMessage::new_text(Role::User, format!("Say hello to {name}"))]
    }
}

#[tool_handler]
#[prompt_handler]
impl ServerHandler for Peer {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_resources().enable_prompts().build())
    }

    async fn list_resources(
        &self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        Ok(ListResourcesResult::with_all_items(vec![Resource::new("peer://note", "note")]))
    }

    async fn read_resource(
        &self, request: ReadResourceRequestParams, _: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        Ok(ReadResourceResult::new(vec![ResourceContents::text("a note", request.uri)]).into())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let at = std::env::args().nth(1).unwrap();
    if at == "stdio" {
        Peer.serve(stdio()).await?.waiting().await?;
        return Ok(());
    }
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", at.parse()?)).await?;
    let service = StreamableHttpService::new(|| Ok(Peer), Arc::new(LocalSessionManager::default()), Default::default());
    loop {
        let (stream, _) = listener.accept().await?;
        let service = TowerToHyperService::new(service.clone());
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}
