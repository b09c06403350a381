// The clients of npm against a server: node clients.mjs ADDRESS NODE_MODULES CLIENT. It ends with 0 if all went well.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [address, modules, client] = process.argv.slice(2);
const require = createRequire(pathToFileURL(join(modules, "of-the-clients.js")));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { z } = await load("zod");

const apiKey = "secret";
const hello = [{ role: "user", content: "Hello" }];
const weather = z.object({ city: z.enum(["Cuzco", "Lima"]), unit: z.enum(["C", "F"]) });
const schema = z.toJSONSchema(weather);
const THREAT = "I will find you and kill you tonight";
// Untrained models say noise: these end when they should.
const brief = { thinking_budget: 5 };

async function all(stream) {
  const found = [];
  for await (const part of stream) found.push(part);
  return found;
}

const clients = {
  async openai() {
    const { default: OpenAI, ...errors } = await load("openai");
    const { zodFunction, zodResponseFormat, zodTextFormat } = await load("openai/helpers/zod");
    const openai = new OpenAI({ baseURL: `${address}/v1`, apiKey, maxRetries: 0 });
    const models = (await openai.models.list()).data.map((model) => model.id);
    assert.deepEqual(models, ["plain", "thinker"]);
    for (const model of models) {
      const chat = { model, messages: hello, max_tokens: 100, temperature: 0, ...brief };

      const whole = await openai.chat.completions.create(chat);
      const chunks = await all(await openai.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } }));
      assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), whole.choices[0].message.content);
      assert.deepEqual(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);

      const events = [];
      const runner = openai.chat.completions.stream(chat).on("content", (delta) => events.push(delta));
      assert.equal(await runner.finalContent(), whole.choices[0].message.content);
      assert.equal(events.join(""), whole.choices[0].message.content);

      const parsed = await openai.chat.completions.parse({ ...chat, response_format: zodResponseFormat(weather, "weather") });
      weather.parse(parsed.choices[0].message.parsed);
      const tool = zodFunction({ name: "weather", parameters: weather });
      const called = await openai.chat.completions.parse({ ...chat, tools: [tool], tool_choice: "required", parallel_tool_calls: false });
      const [call] = called.choices[0].message.tool_calls;
      weather.parse(call.function.parsed_arguments);
      const result = { role: "tool", tool_call_id: call.id, content: "12 C" };
      const messages = [...hello, parsed.choices[0].message, ...hello, called.choices[0].message, result];
      assert.ok((await openai.chat.completions.create({ ...chat, messages, tools: [tool], max_tokens: 10 })).choices[0]);
      let asked = 0;
      const loop = openai.chat.completions.runTools({
        ...chat,
        tools: [{ type: "function", function: { name: "weather", parameters: schema, parse: JSON.parse, function: () => `${++asked} C` } }],
        tool_choice: { type: "function", function: { name: "weather" } },
        parallel_tool_calls: false,
      });
      await loop.done();
      assert.equal(asked, 1);

      const response = await openai.responses.create({ model, input: "Hello", max_output_tokens: 20, temperature: 0 });
      assert.ok(response.output_text);
      assert.equal((await openai.responses.retrieve(response.id)).output_text, response.output_text);
      const next = await openai.responses.create({ model, input: "On", previous_response_id: response.id, max_output_tokens: 5 });
      assert.equal((await all(openai.responses.inputItems.list(next.id))).length, 3);
      await openai.responses.delete(response.id);
      const format = zodTextFormat(weather, "weather");
      weather.parse((await openai.responses.parse({ model, input: "Hello", text: { format }, ...brief })).output_parsed);
      const tools = [{ type: "function", name: "weather", parameters: schema, strict: true }];
      const asking = await openai.responses.parse({ model, input: hello, tools, tool_choice: "required", parallel_tool_calls: false, ...brief });
      const outputs = asking.output.filter((item) => item.type === "function_call");
      outputs.forEach((item) => weather.parse(JSON.parse(item.arguments)));
      const answers = outputs.map((item) => ({ type: "function_call_output", call_id: item.call_id, output: "12 C" }));
      assert.ok(await openai.responses.create({ model, input: [...hello, ...asking.output, ...answers], max_output_tokens: 5 }));
      const stream = openai.responses.stream({ model, input: "Hello", text: { format }, ...brief });
      const kinds = (await all(stream)).map((event) => event.type);
      assert.equal(kinds[0], "response.created");
      weather.parse((await stream.finalResponse()).output_parsed);
    }
    const moderation = await openai.moderations.create({ input: [THREAT, "Good morning"] });
    assert.deepEqual(moderation.results.map((result) => result.flagged), [true, false]);
    const packed = await openai.embeddings.create({ model: "plain", input: "Hello" });
    const plain = await openai.embeddings.create({ model: "plain", input: "Hello", encoding_format: "float" });
    packed.data[0].embedding.forEach((number, index) => assert.ok(Math.abs(number - plain.data[0].embedding[index]) < 1e-6));
    const cut = await openai.chat.completions.create({ model: "plain", messages: hello, max_tokens: 2000, stream: true, ignore_eos: true });
    for await (const _ of cut) break; // leaves, and with it the model is free
    await assert.rejects(openai.chat.completions.create({ model: "other", messages: hello }), errors.NotFoundError);
    await assert.rejects(
      openai.chat.completions.create({ model: "plain", messages: hello, temperature: 9 }),
      (error) => error instanceof errors.BadRequestError && error.param === "temperature" && error.code === "invalid_value",
    );
    const stranger = new OpenAI({ baseURL: `${address}/v1`, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), errors.AuthenticationError);
  },

  async anthropic() {
    const { default: Anthropic, ...errors } = await load("@anthropic-ai/sdk");
    const claude = new Anthropic({ baseURL: address, apiKey, maxRetries: 0 });
    const models = (await all(claude.models.list())).map((model) => model.id);
    assert.deepEqual(models, ["plain", "thinker"]);
    for (const model of models) {
      const asked = { model, max_tokens: 100, messages: hello, temperature: 0 };
      const whole = await claude.messages.create(asked);
      assert.equal(whole.type, "message");
      const stream = claude.messages.stream(asked);
      const texts = [];
      stream.on("text", (delta) => texts.push(delta));
      const final = await stream.finalMessage();
      assert.equal(texts.join(""), final.content[0].text);
      assert.deepEqual(final.content, whole.content);
      assert.equal((await all(await claude.messages.create({ ...asked, stream: true }))).at(-1).type, "message_stop");

      const thinking = model === "thinker" ? { type: "enabled", budget_tokens: 5 } : { type: "disabled" };
      const tool = { name: "weather", description: "Of a city", input_schema: schema };
      const called = await claude.messages
        .stream({ ...asked, thinking, tools: [tool], tool_choice: { type: "any", disable_parallel_tool_use: true } })
        .finalMessage();
      assert.equal(called.content[0].type, model === "thinker" ? "thinking" : "tool_use");
      const call = called.content.at(-1);
      weather.parse(call.input);
      const results = [{ type: "tool_result", tool_use_id: call.id, content: "12 C" }];
      const messages = [...hello, { role: "assistant", content: called.content }, { role: "user", content: results }];
      assert.ok((await claude.messages.create({ ...asked, messages, tools: [tool], max_tokens: 10 })).usage.output_tokens);
    }
    assert.ok((await claude.messages.countTokens({ model: "plain", messages: hello })).input_tokens > 0);
    const { zodOutputFormat } = await load("@anthropic-ai/sdk/helpers/zod");
    const format = zodOutputFormat(weather);
    const parsed = await claude.messages.parse({ model: "plain", max_tokens: 100, messages: hello, output_config: { format } });
    weather.parse(parsed.parsed_output);
    const { betaZodTool } = await load("@anthropic-ai/sdk/helpers/beta/zod");
    let runs = 0;
    const tools = [betaZodTool({ name: "weather", description: "Of a city", inputSchema: weather, run: () => `${++runs} C` })];
    const only = { type: "any", disable_parallel_tool_use: true };
    await claude.beta.messages.toolRunner({ model: "plain", max_tokens: 100, messages: hello, tools, tool_choice: only, max_iterations: 2 });
    assert.ok(runs >= 1);
    await assert.rejects(claude.messages.create({ model: "other", max_tokens: 1, messages: hello }), errors.NotFoundError);
    const stranger = new Anthropic({ baseURL: address, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(
      stranger.messages.create({ model: "plain", max_tokens: 1, messages: hello }),
      (error) => error instanceof errors.AuthenticationError && error.error.type === "error" && Boolean(error.requestID),
    );
  },

  async "ai-sdk-compatible"() {
    const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
    const options = { name: "minga", baseURL: `${address}/v1`, apiKey, includeUsage: true, supportsStructuredOutputs: true };
    const minga = createOpenAICompatible(options);
    await sdk((model) => minga.chatModel(model), "minga", { parallel_tool_calls: false, reasoningEffort: "none" });
    const { embed, embedMany, generateText, streamText } = await load("ai");
    const providerOptions = { minga: { reasoningEffort: "low", thinking_budget: 5 } };
    const thinking = { model: minga.chatModel("thinker"), messages: hello, temperature: 0, maxOutputTokens: 20, providerOptions };
    const thought = await generateText(thinking);
    assert.ok(thought.reasoningText && thought.text && thought.usage.outputTokenDetails.reasoningTokens === 5);
    assert.equal(await streamText(thinking).reasoningText, thought.reasoningText);
    const model = minga.embeddingModel("plain");
    assert.equal((await embedMany({ model, values: ["One", "Two"] })).embeddings.length, 2);
    assert.equal((await embed({ model, value: "One" })).embedding.length, 64);
    assert.ok((await generateText({ model: minga.completionModel("plain"), prompt: "Once", maxOutputTokens: 8 })).usage.outputTokens);
  },

  async "ai-sdk-openai"() {
    const { createOpenAI } = await load("@ai-sdk/openai");
    const openai = createOpenAI({ baseURL: `${address}/v1`, apiKey });
    await sdk((model) => openai(model), "openai", { parallelToolCalls: false }); // responses
    await sdk((model) => openai.chat(model), "openai", { parallelToolCalls: false });
    const { embedMany } = await load("ai");
    const { embeddings } = await embedMany({ model: openai.embedding("plain"), values: ["One", "Two"] });
    assert.equal(embeddings.length, 2);
  },

  async "ai-sdk-anthropic"() {
    const { createAnthropic } = await load("@ai-sdk/anthropic");
    const anthropic = createAnthropic({ baseURL: `${address}/v1`, apiKey });
    await sdk((model) => anthropic(model), "anthropic", { disableParallelToolUse: true });
    const { generateText } = await load("ai");
    const providerOptions = { anthropic: { thinking: { type: "enabled", budgetTokens: 5 } } };
    const thought = await generateText({ model: anthropic("thinker"), messages: hello, maxOutputTokens: 30, providerOptions });
    assert.ok(thought.reasoningText);
  },
};

// What every provider of the AI SDK must do.
async function sdk(provider, name, options) {
  const { APICallError, generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } = await load("ai");
  const common = { messages: hello, maxOutputTokens: 100, maxRetries: 0, temperature: 0, providerOptions: { [name]: options } };
  for (const id of ["plain", "thinker"]) {
    const asked = { ...common, model: provider(id) };
    const whole = await generateText(asked);
    assert.ok(whole.text && whole.usage.outputTokens > 0 && whole.usage.inputTokens > 0);
    assert.ok(["length", "stop"].includes(whole.finishReason), whole.finishReason);
    const streamed = streamText({ ...asked, onError: ({ error }) => { throw error; } });
    assert.equal((await all(streamed.textStream)).join(""), whole.text);
    assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);

    weather.parse((await generateObject({ ...asked, schema: weather })).object);
    weather.parse((await generateText({ ...asked, output: Output.object({ schema: weather }) })).output);
    const object = streamObject({ ...asked, schema: weather, onError: ({ error }) => { throw error; } });
    assert.deepEqual((await all(object.partialObjectStream)).at(-1), await object.object);

    const runs = [];
    const tools = { weather: tool({ description: "Of a city", inputSchema: weather, execute: (input) => (runs.push(input), "12 C") }) };
    const loop = { ...asked, tools, stopWhen: stepCountIs(2), prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }) };
    assert.equal((await generateText(loop)).steps.length, 2);
    const parts = await all(streamText({ ...loop, toolChoice: "required" }).fullStream);
    assert.ok(parts.some((part) => part.type === "tool-input-delta") && parts.some((part) => part.type === "tool-result"));
    assert.ok(!parts.some((part) => part.type === "error"), JSON.stringify(parts.find((part) => part.type === "error")));
    runs.forEach((input) => weather.parse(input));
    assert.ok(runs.length >= 2);
    await assert.rejects(generateText({ ...asked, maxOutputTokens: 1e6 }), (error) => APICallError.isInstance(error) && /context/.test(error.message));
  }
  await assert.rejects(generateText({ ...common, model: provider("other") }), (error) => APICallError.isInstance(error) && error.statusCode === 404);
}

await clients[client]();
