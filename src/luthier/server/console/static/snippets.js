// How a model is called from outside: commands and programs with this server's own address and the model's id.

/**
 * @param {{origin: string, model: Object, storedId: ?string}} options `model` as `GET /api/v1/models/ID` answers,
 *   `storedId` what the command line calls it
 * @returns {Array<{name: string, about: string, code: string}>}
 */
export function snippets({ origin, model, storedId }) {
  const does = model.abilities?.does ?? [];
  const reads = model.abilities?.reads ?? ["text"];
  const found = [];
  if (does.includes("write")) found.push(...writing(origin, model));
  if (does.includes("embed")) found.push(...embedding(origin, model, reads));
  if (does.includes("predict")) found.push(predicting(origin, model, reads));
  if (does.includes("make_images")) found.push(making(origin, model));
  if (does.includes("reconstruct")) {
    found.push({
      name: "curl: images after the way through the network",
      about: "",
      code: uploading(origin, model, "reconstructions", "image", "png", [
        "-H 'Accept: image/png'",
        "--output back.png",
      ]),
    });
  }
  const command = storedId ? commandOf(does, reads, storedId) : null;
  if (command) {
    found.push({ name: "Command line", about: "On the server's machine, with its LUTHIER_HOME.", code: command });
  }
  return found;
}

/** @returns {string} `text` as one word of a shell */
export function shellWord(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** @returns {string} `text` as a string of Python */
export function pythonString(text) {
  return JSON.stringify(text).replaceAll("\u007f", "\\u007f");
}

function openaiClient(origin, ...lines) {
  const client = `client = OpenAI(base_url=${pythonString(`${origin}/v1`)})`;
  return {
    name: "openai client",
    about: "pip install openai; the key is taken from OPENAI_API_KEY.",
    code: ["from openai import OpenAI", "", client, ...lines].join("\n"),
  };
}

function writing(origin, model) {
  const turns = '[{"role": "user", "content": "Hello"}]';
  const body = `{"model": ${JSON.stringify(model.id)}, "messages": ${turns}, "max_tokens": 200, "temperature": 0}`;
  return [
    openaiClient(
      origin,
      "answer = client.chat.completions.create(",
      `    model=${pythonString(model.id)},`,
      `    messages=${turns},`,
      "    max_tokens=200,",
      "    temperature=0,",
      ")",
      "print(answer.choices[0].message.content)",
    ),
    {
      name: "curl",
      about: "",
      code: [
        `curl ${shellWord(`${origin}/v1/chat/completions`)} \\`,
        '  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \\',
        `  -d ${shellWord(body)}`,
      ].join("\n"),
    },
    {
      name: "boto3",
      about: "pip install boto3; the keys are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
      code: boto3(origin, model),
    },
  ];
}

function boto3(origin, model) {
  const clients = [
    "import boto3",
    "",
    `server = {"endpoint_url": ${pythonString(origin)}, "region_name": ${pythonString(regionOf(model.arn))}}`,
  ];
  const ask = (target) => [
    'runtime = boto3.client("bedrock-runtime", **server)',
    "answer = runtime.converse(",
    `    modelId=${target},`,
    '    messages=[{"role": "user", "content": [{"text": "Hello"}]}],',
    '    inferenceConfig={"maxTokens": 200, "temperature": 0},',
    ")",
    'print(answer["output"]["message"]["content"][0]["text"])',
  ];
  if (model.kind !== "custom") return [...clients, ...ask(pythonString(model.id))].join("\n");
  return [
    "import time",
    ...clients,
    'bedrock = boto3.client("bedrock", **server)',
    "deployment = bedrock.create_custom_model_deployment(  # once: as with Bedrock, it is deployed before it is asked",
    `    modelDeploymentName=${pythonString(model.name)},`,
    `    modelArn=${pythonString(model.arn)},`,
    ')["customModelDeploymentArn"]',
    "while (",
    '    bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=deployment)["status"]',
    '    == "Creating"',
    "):",
    "    time.sleep(1)",
    ...ask("deployment"),
  ].join("\n");
}

function embedding(origin, model, reads) {
  if (!reads.includes("text")) return [predicting(origin, model, reads)];
  return [
    openaiClient(
      origin,
      `answer = client.embeddings.create(model=${pythonString(model.id)}, input=["a text", "another"])`,
      "print(len(answer.data), len(answer.data[0].embedding))",
    ),
    {
      name: "curl",
      about: "",
      code: [
        `curl ${shellWord(`${origin}/v1/embeddings`)} \\`,
        '  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \\',
        `  -d ${shellWord(`{"model": ${JSON.stringify(model.id)}, "input": ["a text", "another"]}`)}`,
      ].join("\n"),
    },
  ];
}

function predicting(origin, model, reads) {
  const name = "curl";
  if (reads[0] === "image") return { name, about: "", code: uploading(origin, model, "predictions", "image", "png") };
  if (reads[0] === "audio") return { name, about: "", code: uploading(origin, model, "predictions", "audio", "wav") };
  const input = reads[0] === "window" ? '{"window": [1.0, 1.2, 0.9]}' : '{"text": "What is asked about"}';
  return { name, about: "", code: posting(origin, model, "predictions", `{"inputs": [${input}]}`) };
}

function making(origin, model) {
  const body = model.abilities.reads_prompts ? '{"count": 4, "prompt": "a red star"}' : '{"count": 4}';
  return {
    name: "curl: new images",
    about: "Without the Accept header the images come one by one, in base64.",
    code: posting(origin, model, "images", body, ["-H 'Accept: image/png'", "--output images.png"]),
  };
}

function posting(origin, model, operation, body, more = []) {
  return [
    `curl ${shellWord(`${origin}/api/v1/models/${encodeURIComponent(model.id)}/${operation}`)} \\`,
    '  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \\',
    ...(more.length ? [`  ${more.join(" ")} \\`] : []),
    `  -d ${shellWord(body)}`,
  ].join("\n");
}

function uploading(origin, model, operation, kind, ending, more = []) {
  const media = ending === "wav" ? "audio/wav" : "image/png";
  return [
    `curl ${shellWord(`${origin}/api/v1/models/${encodeURIComponent(model.id)}/${operation}`)} \\`,
    `  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: ${media}" \\`,
    ...(more.length ? [`  ${more.join(" ")} \\`] : []),
    `  --data-binary @${kind}.${ending}`,
  ].join("\n");
}

function commandOf(does, reads, storedId) {
  const id = shellWord(storedId);
  if (does.includes("write")) return `luthier generate ${id} "Hello"\nluthier chat ${id}`;
  if (does.includes("embed")) return `luthier embed ${id} rows.jsonl --output vectors.npy`;
  if (does.includes("predict") && reads[0] === "text") return `luthier predict ${id} "What is asked about"`;
  if (does.includes("make_images")) return `luthier sample ${id} --output images`;
  if (does.includes("predict")) return `luthier predict ${id} FILE`;
  return null;
}

/** @returns {string} the region that an ARN names */
function regionOf(arn) {
  return arn.split(":")[3] || "us-east-1";
}
